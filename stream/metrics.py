"""Every Prometheus metric, in one place.

Names have the prefix `livestate_` and base units; labels are the ones in `LABELS`, whose values come from closed sets
(partitions, reasons, tasks, routes), never from records. Metrics are counted once for each batch, not for each event;
sizes that the store knows anyway are read when Prometheus asks.

Each process has a registry of its own and serves it on a port of its own, so processes on one machine never share a
count. Not guaranteed: counts that outlive their process.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from stream.store import Stats

__all__ = ["LABELS", "OTHER_ROUTE", "HttpMetrics", "ProcessMetrics", "TrainerMetrics", "WorkerMetrics"]

#: Every label, and where its values come from.
LABELS = {
    "cause": "why a row ended: `age`, `cap`",
    "head": "parts of a task's head in the settings, and `average`",
    "label": "`positive`, `negative`",
    "outcome": "what becomes of feedback (`trainer.joiner`), or of labels for a trunk (`trainer.trunk_training`)",
    "partition": "numbers below topics.partitions",
    "reason": "why a record is refused (`stream.wire.REASONS`)",
    "route": "paths that a server answers, as the OpenAPI document writes them, and `other`",
    "status": "HTTP status codes that a server answers with",
    "task": "tasks in the settings",
    "tier": "`memory`, `all`",
    "topic": "topics in the settings",
}
#: Of a path that is no route: paths come from outside.
OTHER_ROUTE = "other"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FRESHNESS = (
    0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95,
    1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0,
)  # fmt: skip


class HttpMetrics:
    """What an HTTP server of worker or trainer tells about the questions it answered."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "livestate_http_requests", "HTTP requests answered.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "livestate_http_request_seconds", "Time to answer an HTTP request.", ["route"], registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer; `route` is one the server knows, or OTHER_ROUTE."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class ProcessMetrics:
    """What worker and trainer both tell: HTTP, disk, readiness, and the process itself (`process_…`)."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.http = HttpMetrics(self.registry)
        self.ready = Gauge("livestate_ready", "1 where /readyz says so, else 0.", registry=self.registry)
        self.data_dir = DiskCollector()
        self.registry.register(self.data_dir)


class DiskCollector(Collector):
    """Room of the file system under a data directory, and what the directory takes of it.

    Nothing before `path` is set. The directory's own size is measured at most every `every_s`, as it means to walk all
    its files.
    """

    def __init__(self, every_s: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.path: Path | None = None
        self._every_s = every_s
        self._clock = clock
        self._due = float("-inf")
        self._used = 0
        self._walking = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        """The families, without samples."""
        return self._families()

    def collect(self) -> Iterator[Metric]:
        """The families, with samples where there is a directory."""
        size, free, used = self._families()
        if self.path is not None and self.path.is_dir():
            room = shutil.disk_usage(self.path)
            size.add_metric([], room.total)
            free.add_metric([], room.free)
            used.add_metric([], self._measured(self.path))
        yield from (size, free, used)

    def _families(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily("livestate_disk_size_bytes", "Size of the file system that holds data_dir."),
            GaugeMetricFamily("livestate_disk_free_bytes", "Room left on the file system that holds data_dir."),
            GaugeMetricFamily("livestate_disk_used_bytes", "Room that the files in data_dir take."),
        )

    def _measured(self, path: Path) -> int:
        with self._walking:
            if self._clock() >= self._due:
                self._used = _size(path)
                self._due = self._clock() + self._every_s
            return self._used


def _size(path: Path) -> int:
    """Bytes that the files under a directory take; what disappears meanwhile counts as nothing."""
    total = 0
    for directory, _, files in os.walk(path):
        for name in files:
            try:
                # Blocks, since files may be sparse.
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except OSError:
                continue
    return total


class StoreCollector(Collector):
    """Sizes and counts of the partitions' stores, read when Prometheus asks."""

    def __init__(self) -> None:
        #: Partition and what its store tells, of the partitions served.
        self.read: Callable[[], Iterable[tuple[int, Stats]]] = tuple

    def describe(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """The families, without samples."""
        return self._families().values()

    def collect(self) -> Iterable[Metric]:
        """The families, with a sample for each partition."""
        families = self._families()
        for number, stats in self.read():
            partition = str(number)
            families["rows"].add_metric([partition, "memory"], stats.memory_rows)
            families["rows"].add_metric([partition, "all"], stats.rows)
            families["unsaved"].add_metric([partition], stats.unsaved_rows)
            families["admitted"].add_metric([partition], stats.admitted)
            families["ended"].add_metric([partition, "age"], stats.expired)
            families["ended"].add_metric([partition, "cap"], stats.capped)
            families["evicted"].add_metric([partition], stats.evicted)
            families["disk_reads"].add_metric([partition], stats.disk_reads)
            families["held_dropped"].add_metric([partition], stats.held_dropped)
            families["overhead"].add_metric([partition], stats.overhead_bytes)
            families["scratch"].add_metric([partition], stats.cold_bytes)
        return families.values()

    def _families(self) -> dict[str, GaugeMetricFamily | CounterMetricFamily]:
        by_partition = ["partition"]
        return {
            "rows": GaugeMetricFamily(
                "livestate_rows", "Live rows: in memory, and all (most of which lie on disk).",
                labels=["partition", "tier"],
            ),
            "unsaved": GaugeMetricFamily(
                "livestate_rows_unsaved", "Rows changed since they were last in a checkpoint.", labels=by_partition
            ),
            "admitted": CounterMetricFamily(
                "livestate_rows_admitted", "Clients that were given a row.", labels=by_partition
            ),
            "ended": CounterMetricFamily(
                "livestate_rows_ended", "Rows ended by age or by store.max_rows.", labels=["partition", "cause"]
            ),
            "evicted": CounterMetricFamily(
                "livestate_rows_evicted", "Rows that left memory and stay on disk.", labels=by_partition
            ),
            "disk_reads": CounterMetricFamily(
                "livestate_store_disk_reads", "Clients looked for on disk, as they were not in memory.",
                labels=by_partition,
            ),
            "held_dropped": CounterMetricFamily(
                "livestate_held_events_dropped",
                "Events of clients without a row that store.held_bytes left no room for.", labels=by_partition,
            ),
            "overhead": GaugeMetricFamily(
                "livestate_store_overhead_bytes", "Memory of the rows in memory beyond their vectors.",
                labels=by_partition,
            ),
            "scratch": GaugeMetricFamily(
                "livestate_store_scratch_bytes", "Disk taken by copies of rows that left memory.", labels=by_partition
            ),
        }  # fmt: skip


class _Tally:
    """A histogram as plain numbers: how many values lie in each bucket, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """What is told of it."""
        limits = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(limits, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


class BatchCollector(Collector):
    """Counts of micro-batches, of which a worker has hundreds a second: plain numbers, read when Prometheus asks.

    One thread counts; any thread may read. Not guaranteed: that a reader finds all numbers of one instant.
    """

    def __init__(self) -> None:
        self.embeddings = 0
        #: Records after the last one applied, by partition.
        self.lag: dict[int, int] = {}
        self._events = self._replayed = 0
        self._records = _Tally((1, 4, 16, 64, 256, 1024, 4096, 16384))
        self._waves = _Tally((1, 2, 4, 8, 16, 64, 256, 1024))
        self._seconds = _Tally(_SECONDS)
        self._ages = _Tally(_SECONDS)

    def count(
        self, partition: int, records: int, events: int, replayed: int, waves: int, *,
        seconds: float, age_s: float, lag: int | None,
    ) -> None:  # fmt: skip
        """Count a micro-batch.

        events, replayed: applied, and skipped since their row had applied them. seconds: it took. age_s: of its oldest
        record when it was done. lag: records after it, None where nobody knows.
        """
        self._events += events
        self._replayed += replayed
        self._records.add(records)
        self._waves.add(waves)
        self._seconds.add(seconds)
        self._ages.add(max(0.0, age_s))
        if lag is not None:
            self.lag[partition] = max(0, lag)

    def describe(self) -> Iterable[Metric]:
        """The families."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """The families, with all there is."""
        yield CounterMetricFamily("livestate_events_applied", "Events applied to rows.", self._events)
        yield CounterMetricFamily(
            "livestate_events_replayed", "Events skipped because their row had applied them before.", self._replayed
        )
        yield CounterMetricFamily("livestate_embeddings_published", "Embedding records produced.", self.embeddings)
        yield self._records.family("livestate_batch_events", "Records in a micro-batch.")
        yield self._seconds.family("livestate_batch_seconds", "Time to process a micro-batch.")
        yield self._waves.family("livestate_batch_waves", "Waves in a micro-batch.")
        yield self._ages.family(
            "livestate_event_to_state_seconds",
            "From a record's Kafka timestamp to its row's new state, for the oldest record of each micro-batch.",
        )
        lag = GaugeMetricFamily("livestate_lag_events", "Records not applied yet.", labels=["partition"])
        for partition, records in list(self.lag.items()):
            lag.add_metric([str(partition)], records)
        yield lag


class WorkerMetrics(ProcessMetrics):
    """What a serving worker tells."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        super().__init__(registry)
        r = self.registry
        self.dead_letters = Counter(
            "livestate_dead_letters", "Records sent to dead-letters, by reason.", ["reason"], registry=r
        )
        self.batches = BatchCollector()
        r.register(self.batches)
        self.stores = StoreCollector()
        r.register(self.stores)
        self.partitions = Gauge("livestate_partitions_assigned", "Partitions this worker serves.", registry=r)
        self.restoring = Gauge(
            "livestate_partitions_restoring", "Partitions assigned whose rows are not there yet.", registry=r
        )
        self.checkpoints = Counter("livestate_checkpoints", "Checkpoints completed.", registry=r)
        self.checkpoint_failures = Counter("livestate_checkpoint_failures", "Checkpoints given up.", registry=r)
        self.checkpoint_rows = Counter("livestate_checkpoint_rows", "Rows written to the changelog.", registry=r)
        self.checkpoint_seconds = Histogram(
            "livestate_checkpoint_seconds", "Time of a partition's checkpoint.", registry=r, buckets=_SECONDS
        )
        self.checkpoint_time = Gauge(
            "livestate_checkpoint_timestamp_seconds",
            "When the partition's last checkpoint was complete, or its rows were restored.",
            ["partition"], registry=r,
        )  # fmt: skip
        self.restored_rows = Counter("livestate_restored_rows", "Rows read back from the changelog.", registry=r)
        self.restore_seconds = Histogram(
            "livestate_restore_seconds", "Time to restore a partition.", registry=r, buckets=_SECONDS
        )
        self.rebuilt = Counter(
            "livestate_rebuilt_events", "Events applied to rows that are rebuilt under another trunk.", registry=r
        )
        self.rebuilding = Gauge(
            "livestate_partitions_rebuilding", "Partitions whose rows wait for another trunk.", registry=r
        )
        self.rebalances = Counter("livestate_rebalances", "Times partitions were assigned.", registry=r)
        self.version = Gauge("livestate_parameter_version", "Version of the parameters in use.", registry=r)
        self.version_time = Gauge(
            "livestate_parameter_created_timestamp_seconds", "When the version in use was made.", registry=r
        )
        self.versions_applied = Counter("livestate_parameter_versions_applied", "Versions swapped in.", registry=r)
        self.versions_torn = Counter(
            "livestate_parameter_versions_torn", "Versions whose tensors were not all there.", registry=r
        )
        self.feedback_to_served = Histogram(
            "livestate_feedback_to_served_seconds",
            "From feedback published to parameters that include it serving in this worker.",
            registry=r, buckets=_FRESHNESS,
        )  # fmt: skip


class TrainerMetrics(ProcessMetrics):
    """What the trainer tells."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        super().__init__(registry)
        r = self.registry
        self.events = Counter("livestate_trainer_events", "Events the trainer has applied.", registry=r)
        self.lag = Gauge("livestate_trainer_lag_events", "Records not read yet.", ["topic"], registry=r)
        self.lag_seconds = Gauge(
            "livestate_trainer_lag_seconds",
            "Age of the oldest record that was fetched and not taken yet, by its Kafka timestamp; 0: there is none.",
            registry=r,
        )
        self.label_share = Gauge(
            "livestate_trainer_label_share",
            "Share of labels that are learned from; below 1 while the trainer is behind and samples.",
            registry=r,
        )
        self.dead_letters = Counter(
            "livestate_dead_letters", "Records sent to dead-letters, by reason.", ["reason"], registry=r
        )
        self.feedback = Counter(
            "livestate_feedback",
            "Feedback by task and by what became of it.",
            ["task", "outcome"],
            registry=r,
        )
        self.pending_examples = Gauge(
            "livestate_pending_examples", "Predictions whose feedback has not come.", registry=r
        )
        self.pending_feedback = Gauge("livestate_pending_feedback", "Feedback whose event has not come.", registry=r)
        self.held_labels = Gauge(
            "livestate_held_labels", "Labels that are known and wait until they are final.", registry=r
        )
        self.early_labels = Counter(
            "livestate_early_labels",
            "Labels taken as final before their window had closed.",
            ["task", "label"],
            registry=r,
        )
        self.learned = Counter("livestate_examples_learned", "Examples learned from.", ["task"], registry=r)
        self.dropped = Counter(
            "livestate_examples_dropped",
            "Examples not learned from, as a number was not finite.",
            ["task"],
            registry=r,
        )
        self.passed_over = Counter(
            "livestate_examples_passed_over",
            "Labels not learned from, as the trainer was behind and learned from a sample of them.",
            ["task"], registry=r,
        )  # fmt: skip
        self.sampled_out = Counter(
            "livestate_negatives_sampled_out",
            "Negatives not learned from, as tasks.NAME.negative_rate leaves them out.",
            ["task"], registry=r,
        )  # fmt: skip
        self.trunk_labels = Counter(
            "livestate_trunk_labels",
            "Labels that came to a trunk that learns online, by what became of them: learned; outside the client's "
            "window; without a head to learn through; not finite; too many at once.",
            ["task", "outcome"],
            registry=r,
        )
        self.trunk_steps = Counter("livestate_trunk_steps", "Steps of a trunk that learns online.", registry=r)
        self.late_predictions = Counter(
            "livestate_late_predictions",
            "Events that ask for a prediction but came after a newer one of their client: no examples.",
            ["task"], registry=r,
        )  # fmt: skip
        self.prequential_loss = Gauge(
            "livestate_prequential_log_loss",
            "Mean log loss of predictions before learning. head: a part of the task's head, or `average` of several.",
            ["task", "head"],
            registry=r,
        )
        self.prequential_auc = Gauge(
            "livestate_prequential_auc",
            "AUC of predictions before learning; of several classes, the mean of each one's against the others.",
            ["task", "head"],
            registry=r,
        )
        self.prequential_error = Gauge(
            "livestate_prequential_squared_error",
            "Mean squared error of a regression's predictions before learning.",
            ["task", "head"],
            registry=r,
        )
        self.guard_holding = Gauge(
            "livestate_trainer_guard_holding",
            "1 while what a task learned is not published, as it proves worse than a good state or is not finite.",
            ["task"], registry=r,
        )  # fmt: skip
        self.guard_held_back = Counter(
            "livestate_trainer_guard_held_back_versions",
            "Versions that a task's newest labels would have been in, had they not been held back.",
            ["task"], registry=r,
        )  # fmt: skip
        self.guard_returns = Counter(
            "livestate_trainer_guard_returns",
            "Times that a task's learner went back to a good state.",
            ["task"], registry=r,
        )  # fmt: skip
        self.guard_evidence = Gauge(
            "livestate_trainer_guard_evidence_log10",
            "Decimal logarithm of how much speaks for a task's learner being worse than its good state.",
            ["task"], registry=r,
        )  # fmt: skip
        self.version = Gauge("livestate_parameter_version", "Last version published.", registry=r)
        self.taking_over = Gauge(
            "livestate_trainer_taking_over",
            "1 while this trainer learns beside another one, to take over from it.",
            registry=r,
        )
        self.versions_published = Counter(
            "livestate_parameter_versions_published",
            "Versions committed to the parameters topic.",
            registry=r,
        )
        self.publish_failures = Counter(
            "livestate_parameter_publish_failures",
            "Versions whose transaction failed and is tried again.",
            registry=r,
        )
        self.publish_seconds = Histogram(
            "livestate_parameter_publish_seconds", "Time to publish a version.", registry=r, buckets=_SECONDS
        )
        self.checkpoint_seconds = Histogram(
            "livestate_trainer_checkpoint_seconds", "Time of a checkpoint.", registry=r, buckets=_SECONDS
        )
        self.checkpoint_time = Gauge(
            "livestate_trainer_checkpoint_timestamp_seconds",
            "When the last checkpoint was complete, or the trainer started.",
            registry=r,
        )
        self.stream_time = Gauge(
            "livestate_stream_timestamp_seconds", "Largest event time the trainer has seen.", registry=r
        )
