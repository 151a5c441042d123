"""What goes wrong, and when: a schedule of faults drawn from a seed.

Guaranteed: a seed, a number of faults and a choice of kinds give the same schedule everywhere; a shorter one is
the beginning of a longer one. Time is told in events published and in seconds that a fault lasts, never by the
clock, so a slow machine runs the same schedule, only longer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["EMBEDDED_KINDS", "FIRST", "KINDS", "NAMES", "Fault", "Kind", "draw"]

Kind = Literal["kill", "freeze", "join", "leave", "wipe", "broker", "slow", "version"]

KINDS: tuple[Kind, ...] = get_args(Kind)
#: A broker in memory loses its topics when it ends.
EMBEDDED_KINDS: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind != "broker")
#: The workers there may be, and those there are at the start.
NAMES = ("a", "b", "c", "d")
FIRST = ("a", "b")

_MOST_EVENTS_BETWEEN = 600
_SETTLED = 0.6


@dataclass(frozen=True)
class Fault:
    """One fault.

    kind: `kill` SIGKILL, started again after `seconds`; `freeze` SIGSTOP for `seconds`, longer than the session
        timeout; `join` started, on the disk it left behind if it ran before; `leave` SIGTERM; `wipe` SIGKILL,
        disk deleted, started again; `broker` SIGKILL, started again after `seconds`; `slow` SIGSTOP for
        `seconds`, shorter than the session timeout; `version` another parameter version.
    worker: whom it hits; empty for `broker` and `version`.
    after_events: how many events are published between the fault before and this one.
    settles: whether the next fault waits until every partition is served again.
    """

    kind: Kind
    worker: str
    after_events: int
    seconds: float
    settles: bool


def draw(seed: int, count: int, kinds: Sequence[Kind] = KINDS, *, session_timeout_s: float = 6.0) -> tuple[Fault, ...]:
    """`count` faults; every kind comes once before any comes twice, as far as the number of workers allows."""
    rng = random.Random(seed)
    running = list(FIRST)
    bag: list[Kind] = []
    faults: list[Fault] = []
    while len(faults) < count:
        if not any(_possible(kind, running) for kind in bag):
            again = list(kinds)
            rng.shuffle(again)
            bag += again
        kind = next(kind for kind in bag if _possible(kind, running))
        bag.remove(kind)
        faults.append(_fault(rng, kind, running, session_timeout_s))
    return tuple(faults)


def _possible(kind: Kind, running: list[str]) -> bool:
    return {"join": len(running) < len(NAMES), "leave": len(running) > 1}.get(kind, True)


def _fault(rng: random.Random, kind: Kind, running: list[str], session_timeout_s: float) -> Fault:
    worker = ""
    if kind == "join":
        worker = rng.choice([name for name in NAMES if name not in running])
        running.append(worker)
    elif kind not in ("broker", "version"):
        worker = rng.choice(sorted(running))
        if kind == "leave":
            running.remove(worker)
    shortest, longest = {
        "kill": (0.0, 2.0),
        "freeze": (1.2 * session_timeout_s, 1.6 * session_timeout_s),
        "wipe": (0.0, 1.0),
        "broker": (0.5, 5.0),
        "slow": (0.2, 0.4 * session_timeout_s),
    }.get(kind, (0.0, 0.0))
    return Fault(
        kind,
        worker,
        rng.randrange(_MOST_EVENTS_BETWEEN),
        round(rng.uniform(shortest, longest), 2),
        rng.random() < _SETTLED,
    )
