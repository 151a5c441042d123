"""Every Prometheus metric, in one place.

Names have the prefix `livestate_` and base units; labels come from closed sets (topics, partitions, reasons,
tasks), never from records. Metrics are counted once for each batch, not for each event.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["TrainerMetrics", "WorkerMetrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FRESHNESS = (
    0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95,
    1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0,
)  # fmt: skip


class WorkerMetrics:
    """What a serving worker tells."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        r = self.registry
        self.events = Counter("livestate_events_applied", "Events applied to rows.", registry=r)
        self.replayed = Counter(
            "livestate_events_replayed",
            "Events skipped because their row had applied them before.",
            registry=r,
        )
        self.dead_letters = Counter(
            "livestate_dead_letters", "Records sent to dead-letters, by reason.", ["reason"], registry=r
        )
        self.embeddings = Counter("livestate_embeddings_published", "Embedding records produced.", registry=r)
        self.batch_events = Histogram(
            "livestate_batch_events", "Records in a micro-batch.", registry=r,
            buckets=(1, 4, 16, 64, 256, 1024, 4096, 16384),
        )  # fmt: skip
        self.batch_seconds = Histogram(
            "livestate_batch_seconds", "Time to process a micro-batch.", registry=r, buckets=_SECONDS
        )
        self.batch_waves = Histogram(
            "livestate_batch_waves",
            "Waves in a micro-batch.",
            registry=r,
            buckets=(1, 2, 4, 8, 16, 64, 256, 1024),
        )
        self.latency = Histogram(
            "livestate_event_to_state_seconds",
            "From a record's Kafka timestamp to its row's new state, for the oldest record of each micro-batch.",
            registry=r, buckets=_SECONDS,
        )  # fmt: skip
        self.lag = Gauge("livestate_lag_events", "Records not applied yet.", ["partition"], registry=r)
        self.rows = Gauge(
            "livestate_rows",
            "Live rows: in memory, and all (most of which lie on disk).",
            ["partition", "tier"],
            registry=r,
        )
        self.expired = Counter("livestate_rows_ended", "Rows ended by age or by store.max_rows.", registry=r)
        self.held_dropped = Gauge(
            "livestate_held_events_dropped",
            "Events of clients without a row that store.held_bytes left no room for.",
            ["partition"],
            registry=r,
        )
        self.partitions = Gauge("livestate_partitions_assigned", "Partitions this worker serves.", registry=r)
        self.checkpoints = Counter("livestate_checkpoints", "Checkpoints completed.", registry=r)
        self.checkpoint_failures = Counter("livestate_checkpoint_failures", "Checkpoints given up.", registry=r)
        self.checkpoint_rows = Counter("livestate_checkpoint_rows", "Rows written to the changelog.", registry=r)
        self.checkpoint_seconds = Histogram(
            "livestate_checkpoint_seconds", "Time of a partition's checkpoint.", registry=r, buckets=_SECONDS
        )
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


class TrainerMetrics:
    """What the trainer tells."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        r = self.registry
        self.events = Counter("livestate_trainer_events", "Events the trainer has applied.", registry=r)
        self.lag = Gauge("livestate_trainer_lag_events", "Records not read yet.", ["topic"], registry=r)
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
            "livestate_held_labels", "Labels that are known and wait until their window has closed.", registry=r
        )
        self.learned = Counter("livestate_examples_learned", "Examples learned from.", ["task"], registry=r)
        self.dropped = Counter(
            "livestate_examples_dropped",
            "Examples not learned from, as a number was not finite.",
            ["task"],
            registry=r,
        )
        self.late_predictions = Counter(
            "livestate_late_predictions",
            "Events that ask for a prediction but came after a newer one of their client: no examples.",
            ["task"], registry=r,
        )  # fmt: skip
        self.prequential_loss = Gauge(
            "livestate_prequential_log_loss",
            "Mean log loss of predictions before learning.",
            ["task"],
            registry=r,
        )
        self.prequential_auc = Gauge(
            "livestate_prequential_auc", "AUC of predictions before learning.", ["task"], registry=r
        )
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
        self.stream_time = Gauge(
            "livestate_stream_timestamp_seconds", "Largest event time the trainer has seen.", registry=r
        )
