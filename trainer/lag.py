"""How far the trainer is behind its topics, and what it does about it.

Behind it is where the oldest record that was fetched and not taken yet is older than `trainer.behind_s`, by Kafka's
timestamp. It says so, in records and in seconds, and either waits, which is to go on with everything in its order, or
learns from a share of the labels until it is no longer behind (`trainer.when_behind`).

Guaranteed, either way: every event changes its row and every feedback record has its outcome. Labels are chosen by a
hash of client, task and time, not by their value, so a sample is of the same kind as all of them, and each one in it
weighs as many as it stands for: predictions keep their level. Not guaranteed while labels are sampled: that a trainer
which crashed learns the same again, as how far it is behind depends on the clock.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace

from stream.metrics import TrainerMetrics
from stream.settings import Trainer
from trainer.joiner import Joined

__all__ = ["Lag", "sampled"]

logger = logging.getLogger(__name__)

_TELL_S = 30.0
_HASHES = 2.0**64


def sampled(joined: Joined, share: float) -> Joined | None:
    """The labelled example with the weight of those it stands for; None where it is not in the sample.

    Parameters
    ----------
    share: of all labels that are in it; above 0, at most 1.
    """
    if share >= 1.0:
        return joined
    example = joined.example
    name = struct.pack(">q", example.as_of_ms) + example.task.encode() + b"\0" + example.client_id
    (drawn,) = struct.unpack(">Q", hashlib.blake2b(name, digest_size=8).digest())
    return replace(joined, weight=joined.weight / share) if drawn < share * _HASHES else None


class Lag:
    """Follows how far the trainer is behind.

    Parameters
    ----------
    clock, monotonic: UTC seconds, and seconds that never go back.
    """

    def __init__(
        self, settings: Trainer, metrics: TrainerMetrics, clock: Callable[[], float], monotonic: Callable[[], float]
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._monotonic = monotonic
        self._told_at = -_TELL_S
        self.seconds = 0.0
        self.is_behind = False

    @property
    def label_share(self) -> float:
        """The share of labels to learn from now."""
        return self._settings.sample_share if self.is_behind and self._settings.when_behind == "sample" else 1.0

    def note(self, oldest_ms: int | None) -> None:
        """Take Kafka's time of the oldest record that waits to be taken; None: there is none."""
        self.seconds = 0.0 if oldest_ms is None else max(0.0, self._clock() - oldest_ms / 1000.0)
        # Half the way back, so that it does not turn with every fetch.
        limit_s = self._settings.behind_s / (2.0 if self.is_behind else 1.0)
        self.is_behind = self.seconds > limit_s

    def tell(self, records: Mapping[str, int]) -> None:
        """Set the gauges, and log, now and then, while it is behind.

        Parameters
        ----------
        records: of each topic, those that were not taken yet.
        """
        for topic, count in records.items():
            self._metrics.lag.labels(topic).set(count)
        self._metrics.lag_seconds.set(self.seconds)
        self._metrics.label_share.set(self.label_share)
        now = self._monotonic()
        if self.is_behind and now - self._told_at >= _TELL_S:
            self._told_at = now
            share = self.label_share
            logger.warning(
                "the trainer is %.0f s behind: %s are not taken yet; %s",
                self.seconds,
                " and ".join(f"{count} records of {topic}" for topic, count in records.items()),
                "it goes on with all of them, in order"
                if share == 1.0
                else f"every event is applied, and {share:g} of the labels are learned from",
            )
