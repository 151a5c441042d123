"""A small shop for the trainer's tests: its settings, its events, and a trainer of it without Kafka."""

from collections.abc import Callable, Iterable
from pathlib import Path

from stream.errors import RecordError
from stream.metrics import TrainerMetrics
from stream.settings import Settings, parse
from stream.wire import FeedbackRecord, RecordBlock, encode_event, encode_feedback
from trainer.learner import BayesianLogistic, LogisticLearner, TaskLearner
from trainer.online import OnlineTrainer
from trainer.pretrain import random_trunk
from trainer.timeline import Record

DAY_MS = 86_400_000
START_MS = 1_500_000_000_000

TOML = """
[modalities.purchase.fields]
department = { type = "category", embedding = 4, min_count = 2, values = ["A", "B"] }
amount = { type = "number" }
[modalities.send.fields]
kind = { type = "category", embedding = 2, min_count = 1, values = ["x", "y"] }
[[memory]]
name = "spent"
modality = "purchase"
kind = "sum"
field = "amount"
[[memory]]
name = "spent_30d"
modality = "purchase"
kind = "sum"
field = "amount"
half_life_s = 2_592_000
[[memory]]
name = "departments"
modality = "purchase"
kind = "count"
by = "department"
[[memory]]
name = "last_purchase"
modality = "purchase"
kind = "last_time"
[tasks.redeemed]
on = "send"
standardise_after = 20
prior_variance = 0.1
inputs = ["kind"]
feedback_ttl_s = 2_592_000
[model]
hidden = 8
[topics]
partitions = 2
[pretrain]
targets = ["purchase.department"]
sequence = 16
"""

#: The same, with a weight for each kind of send.
TABLED = TOML.replace('inputs = ["kind"]', 'inputs = ["kind"]\ntables = ["kind"]\ntable_admission = 3')


def settings(**overrides: str) -> Settings:
    """The shop's settings; overrides as environment variables without their prefix."""
    return parse(TOML, {f"LIVESTATE_{name}": value for name, value in overrides.items()})


def purchase(client: str, time_ms: int, amount: float = 1.0, department: str = "A") -> bytes:
    return encode_event(client, time_ms, "purchase", {"amount": amount, "department": department})


def send(client: str, time_ms: int, kind: str = "x") -> bytes:
    return encode_event(client, time_ms, "send", {"kind": kind})


def answer(
    client: str,
    as_of_ms: int,
    label: bool,
    known_ms: int | None = None,
    task: str = "redeemed",
    window_end_ms: int | None = None,
) -> bytes:
    known = as_of_ms + DAY_MS if known_ms is None else known_ms
    return encode_feedback(FeedbackRecord(client, known, as_of_ms, task, label, window_end_ms=window_end_ms))


def records(
    values: Iterable[tuple[str, bytes]], first: int = 0, partition: int = 0, published_ms: int = 2_000_000_000_000
) -> list[Record]:
    """Consecutive records of a partition from (client, value) pairs."""
    return [
        Record(partition, first + i, published_ms + i, client.encode(), value, ())
        for i, (client, value) in enumerate(values)
    ]


def block(values: Iterable[tuple[str, bytes]], first: int = 0) -> RecordBlock:
    pairs = list(values)
    return RecordBlock.from_lists(
        [client.encode() for client, _ in pairs],
        [value for _, value in pairs],
        list(range(first, first + len(pairs))),
        [2_000_000_000_000] * len(pairs),
    )


def refuse_nothing(record: Record, error: RecordError) -> None:
    raise AssertionError(f"{record} was refused: {error}")


def open_trainer(
    directory: Path,
    shop: Settings,
    metrics: TrainerMetrics | None = None,
    refuse: Callable[[Record, RecordError], None] = refuse_nothing,
    record: Path | None = None,
) -> OnlineTrainer:
    return OnlineTrainer(shop, directory, random_trunk(shop, []), metrics or TrainerMetrics(), refuse, record)


def posterior(learner: TaskLearner) -> BayesianLogistic:
    """Of the head `logistic`."""
    part = learner.parts["logistic"]
    assert isinstance(part, LogisticLearner)
    return part.posteriors[0]


def outcome(metrics: TrainerMetrics, name: str, task: str = "redeemed") -> float:
    """How many feedback records had this outcome."""
    value = metrics.registry.get_sample_value("livestate_feedback_total", {"task": task, "outcome": name})
    return value or 0.0
