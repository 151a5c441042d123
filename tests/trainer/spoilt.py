"""A shop whose labels are wrong for a while: every send is answered at once, and its kind decides the label."""

import numpy as np

from trainer.online import OnlineTrainer
from trainer.timeline import Record

from .shop import START_MS, TABLED, answer, send

#: The learner's weights move easily, and good states lie close together.
SPOILT = TABLED.replace("prior_variance = 0.1", "prior_variance = 10.0\nkeep_examples = 1024")
OPTIONS = {"TRAINER__GUARD_LABELS": "512", "TRAINER__GUARD_FALSE_ALARM_LABELS": "1000"}
#: Labels until it is sure of what is right, then wrong ones, then right ones until it must have been found out.
RIGHT, WRONG, AGAIN = 1_024, 448, 448
PIECE = 32


def spoilt(first: int, count: int, wrong: bool = False) -> tuple[list[Record], list[Record]]:
    """Events and feedback of sends number `first` and on; one in twenty labels is the other way round.

    By Kafka's times, answers come after the sends of their piece and before those of the next.
    """
    events: list[Record] = []
    feedback: list[Record] = []
    for n in range(first, first + count):
        random = np.random.default_rng(n)
        name, at = f"client-{n}", START_MS + 1_000 * n
        kind = "xy"[int(random.integers(2))]
        label = (kind == "x") ^ wrong ^ bool(random.random() < 0.05)
        came = START_MS + 1_000 * PIECE * (n // PIECE)
        events.append(Record(0, n, came, name.encode(), send(name, at, kind), ()))
        feedback.append(Record(0, n, came + 500, name.encode(), answer(name, at, label, at + 1), ()))
    return events, feedback


def give(trainer: OnlineTrainer, first: int, count: int, wrong: bool = False) -> None:
    """Let a trainer without a broker learn them, `PIECE` sends before their answers; both are multiples of that."""
    for number in range(first, first + count, PIECE):
        events, feedback = spoilt(number, PIECE, wrong)
        trainer.apply_events(events)
        trainer.apply_feedback(feedback)


def returns(trainer: OnlineTrainer) -> float:
    """How often its learner went back."""
    found = trainer.metrics.registry.get_sample_value("livestate_trainer_guard_returns_total", {"task": "redeemed"})
    return found or 0.0
