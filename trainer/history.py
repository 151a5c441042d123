"""Versions that can be gone back to: what each was, and the state of the learners that made it.

Bounded: at most `limit` versions. The newest and the oldest stay; of those between, one goes whose neighbours are close
together for its age, so recent versions lie close and older ones further and further apart.

Guaranteed: a state is of the very moment at which its version's tensors were made; states are written with the
trainer's checkpoint. Not guaranteed: that any version is kept; `kept` lists those that are.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import msgpack

from stream.errors import ParametersError
from trainer.checkpoint import Changes, Database

__all__ = ["History", "KeptVersion"]

_PREFIX = b"v/"


@dataclass(frozen=True)
class KeptVersion:
    """One version. By task: `labels` in it, and `loss` of predictions before they were answered, the log loss or of a
    regression the squared error; None where there was none. `equals`: the version it went back to, if it is not one
    that was learned.
    """

    version: int
    epoch: int
    created_ms: int
    trunk: str
    labels: dict[str, int]
    loss: dict[str, float | None]
    equals: int | None = None


class History:
    """Kept versions, oldest first.

    Parameters
    ----------
    database: holds those of earlier checkpoints.
    limit: most versions.
    """

    def __init__(self, database: Database, limit: int) -> None:
        self._database = database
        self._limit = limit
        self._kept: dict[int, KeptVersion] = {}
        #: Of versions since the last checkpoint, the states of their learners by task.
        self._states: dict[int, Mapping[str, bytes]] = {}
        self._dropped: set[int] = set()
        for key, value in database.scan(_PREFIX):
            if key.endswith(b"/about"):
                about = KeptVersion(**msgpack.unpackb(value))
                self._kept[about.version] = about

    @property
    def kept(self) -> list[KeptVersion]:
        """The versions that can be gone back to, oldest first."""
        return list(self._kept.values())

    def __getitem__(self, version: int) -> KeptVersion:
        """One of them.

        Raises
        ------
        ParametersError: it is not kept; names those that are.
        """
        try:
            return self._kept[version]
        except KeyError:
            known = ", ".join(map(str, self._kept)) or "none yet"
            raise ParametersError(f"version {version} is not kept: expected one of {known}") from None

    def add(self, about: KeptVersion, states: Mapping[str, bytes]) -> None:
        """Keep a version that was published, with its learners' states by task."""
        self._kept[about.version] = about
        self._states[about.version] = states
        if len(self._kept) > self._limit:
            dropped = self._least_missed()
            del self._kept[dropped]
            if self._states.pop(dropped, None) is None:
                self._dropped.add(dropped)

    def _least_missed(self) -> int:
        kept = self.kept
        now_ms = kept[-1].created_ms

        def distance(i: int) -> float:
            return (kept[i + 1].created_ms - kept[i - 1].created_ms) / max(1, now_ms - kept[i].created_ms)

        return kept[min(range(1, len(kept) - 1), key=distance)].version if len(kept) > 2 else kept[0].version

    def states(self, version: int) -> Mapping[str, bytes]:
        """The states of a kept version's learners, by task."""
        if version in self._states:
            return self._states[version]
        prefix = _key(version) + b"/t/"
        return {key.removeprefix(prefix).decode(): value for key, value in self._database.scan(prefix)}

    def save(self, changes: Changes) -> None:
        """Add what changed since the last checkpoint."""
        for version, states in self._states.items():
            changes[_key(version) + b"/about"] = msgpack.packb(asdict(self._kept[version]))
            for task, state in states.items():
                changes[_key(version) + b"/t/" + task.encode()] = state
        for version in self._dropped:
            for key, _ in self._database.scan(_key(version) + b"/"):
                changes[key] = None

    def saved(self) -> None:
        """The checkpoint is written."""
        self._states.clear()
        self._dropped.clear()


def _key(version: int) -> bytes:
    return _PREFIX + struct.pack(">q", version)
