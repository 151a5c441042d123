"""Examples that cannot be learned from go to dead-letters: a number in them, or what they do to a head, is not finite.

Such an example is dropped by the learner, which stays as it was. Its feedback was valid when it came, and may have been
held since, so what is sent is the feedback written anew. A head that learns in steps of several labels drops a step as
a whole; all of its labels that this process has seen are sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from stream.errors import RecordError
from stream.metrics import TrainerMetrics
from stream.partitioner import partition_of
from stream.settings import Settings
from stream.wire import FeedbackRecord, encode_feedback
from stream.wire.reasons import NOT_FINITE
from trainer.examples import Joined
from trainer.timeline import Record

__all__ = ["Poison"]

#: Offset of a dead letter that is not one record as received.
NO_OFFSET = -1
_HEADERS = (("content-type", b"application/msgpack"),)


class Poison:
    """Sends feedback of dropped examples to `refuse`."""

    def __init__(
        self, settings: Settings, metrics: TrainerMetrics, refuse: Callable[[Record, RecordError], None]
    ) -> None:
        self._partitions = settings.topics.partitions
        self._metrics = metrics
        self._refuse = refuse
        #: Of each task, the labels that one step can take.
        self._recent: dict[str, deque[Joined]] = {
            name: deque(maxlen=task.mlp.new_examples if "mlp" in task.parts else 1)
            for name, task in settings.tasks.items()
        }

    def learned(self, joined: Joined, dropped: int) -> None:
        """An example was given to its learner, which dropped so many because of it."""
        recent = self._recent[joined.example.task]
        recent.append(joined)
        for one in reversed([recent.pop() for _ in range(min(dropped, len(recent)))]):
            self.send(one, "it was not learned from")

    def send(self, joined: Joined, consequence: str) -> None:
        """Send the feedback of one example."""
        example = joined.example
        client_id = example.client_id.decode()
        value = encode_feedback(
            FeedbackRecord(
                client_id, joined.known_ms, example.as_of_ms, example.task, joined.label, joined.weight, joined.final_ms
            )
        )
        record = Record(
            partition_of(example.client_id, self._partitions), NO_OFFSET, joined.published_ms, example.client_id, value,
            _HEADERS,
        )  # fmt: skip
        detail = (
            f"task = {example.task!r}, as_of_ms = {example.as_of_ms}: expected an example whose inputs, loss and "
            f"gradient are finite; {consequence}"
        )
        self._metrics.dead_letters.labels(NOT_FINITE).inc()
        self._refuse(record, RecordError(NOT_FINITE, detail))
