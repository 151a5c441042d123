"""The boards: what they show, and the queries. `python -m deploy.grafana.boards` writes deploy/grafana/dashboards."""

from __future__ import annotations

import json
from pathlib import Path

from deploy.grafana.panels import Board, Graph, Section, Steps, Tile

__all__ = ["BOARDS", "DIRECTORY", "text_of"]

DIRECTORY = Path(__file__).parent / "dashboards"

_ALL: Steps = ((None, "red"), (1, "green"))
_NONE: Steps = ((None, "green"), (1, "red"))
_BLUE: Steps = ((None, "blue"),)
_RATE = "[$__rate_interval]"
_WORKERS = 'instance=~"$instance"'


def _below(warning: float, bad: float) -> Steps:
    return ((None, "green"), (warning, "yellow"), (bad, "red"))


def _above(bad: float, warning: float) -> Steps:
    return ((None, "red"), (bad, "yellow"), (warning, "green"))


def _quantile(q: float, metric: str, by: str = "le", where: str = "", window: str = _RATE) -> str:
    return f"histogram_quantile({q}, sum by ({by}) (rate({metric}_bucket{where}{window})))"


def _mean(metric: str, where: str) -> str:
    return f"rate({metric}_sum{where}{_RATE}) / rate({metric}_count{where}{_RATE})"


_DEAD_LETTERS = Tile(
    "Dead letters in 10 min", "sum(increase(livestate_dead_letters_total[10m])) or vector(0)", "short",
    _below(1, 100), "Records refused by workers and trainer. `reason` in the topic says why.", 0,
)  # fmt: skip

OVERVIEW = Board(
    "overview",
    "overview",
    "All tiles green or blue: healthy. What to do for each alert stands in deploy/README.md.",
    [
        Tile(
            "Alerts", 'count(ALERTS{alertname=~"Livestate.+", alertstate="firing"}) or vector(0)', "short", _NONE,
            "Alerts that fire; the red lines in the graphs say when.", 0,
        ),
        Tile(
            "Ready", "sum(livestate_ready) / count(up{job=~\"livestate-.+\"})", "percentunit", _ALL,
            "Of the workers and the trainer; /readyz of the others says why not.", 0,
        ),
        Tile(
            "Partitions served", "livestate:partitions_assigned:sum", "short", _ALL,
            "Sum over all workers; none means that states stand still.", 0,
        ),
        Tile("Events applied", "livestate:events_applied:rate1m", "cps", _BLUE, "By all workers."),
        Tile(
            "Behind by", "livestate:lag:seconds", "s", _below(5, 60),
            "Time to apply what has been published, at the present pace.",
        ),
        Tile(
            "Event to state, p99", "livestate:event_to_state_seconds:p99 >= 0 or vector(0)", "s", _below(1, 5),
            "From a record's Kafka timestamp to its row's new state.",
        ),
        Tile(
            "Feedback to served, p99", "livestate:feedback_to_served_seconds:p99 >= 0 or vector(0)", "s", _below(1, 5),
            "From feedback published to parameters that include it serving. 0 where none came.",
        ),
        Tile(
            "Learned and not served for",
            "max(livestate:parameter_age:seconds and on () sum(increase(livestate_examples_learned_total[5m])) > 0)"
            " or vector(0)",
            "s", _below(60, 300), "Age of the oldest parameters in use, where something was learned lately.",
        ),
        Tile(
            "Trainer behind by", "livestate:trainer_lag_events:sum", "short", _below(10_000, 100_000),
            "Events and feedback that the trainer has not read yet.",
        ),
        Tile(
            "Oldest checkpoint", "max(livestate:checkpoint_age:seconds)", "s", _below(60, 300),
            "Of a partition or the trainer: a restart applies what came since.",
        ),
        Tile(
            "Least disk free", "min(livestate:disk_free:ratio)", "percentunit", _above(0.05, 0.15),
            "Of the file systems that hold the data directories.", 0,
        ),
        _DEAD_LETTERS,
    ],
    [
        Section(
            "Serving",
            [
                Graph(
                    "Events and embeddings", "cps",
                    {
                        "applied": f"sum(rate(livestate_events_applied_total{_RATE}))",
                        "skipped, applied before": f"sum(rate(livestate_events_replayed_total{_RATE}))",
                        "embeddings": f"sum(rate(livestate_embeddings_published_total{_RATE}))",
                    },
                ),
                Graph("Time to catch up", "s", {"to apply what waits": "livestate:lag:seconds"}, limit=60),
                Graph(
                    "Event to state", "s",
                    {
                        "p50": _quantile(0.5, "livestate_event_to_state_seconds"),
                        "p99": _quantile(0.99, "livestate_event_to_state_seconds"),
                    },
                    "The oldest record of each micro-batch.",
                ),
            ],
        ),
        Section(
            "Learning",
            [
                Graph(
                    "Feedback to served", "s",
                    {
                        "p50": _quantile(0.5, "livestate_feedback_to_served_seconds", window="[5m]"),
                        "p99": _quantile(0.99, "livestate_feedback_to_served_seconds", window="[5m]"),
                    },
                    limit=5,
                ),
                Graph("AUC before learning", "none", {"{{task}} {{head}}": "livestate_prequential_auc"}),
                Graph(
                    "Versions", "none", {"{{instance}}": "livestate_parameter_version"},
                    "Of the trainer and of each worker: the curves lie on each other.",
                ),
            ],
        ),
        Section(
            "Machines",
            [
                Graph(
                    "Processor cores", "short",
                    {"{{instance}}": f'rate(process_cpu_seconds_total{{job=~"livestate-.+"}}{_RATE})'},
                ),
                Graph("Memory", "bytes", {"{{instance}}": 'process_resident_memory_bytes{job=~"livestate-.+"}'}),
                Graph("Disk used by data", "bytes", {"{{instance}}": "livestate_disk_used_bytes"}),
            ],
        ),
    ],
)  # fmt: skip

WORKER = Board(
    "worker",
    "worker",
    "One worker or several: choose above.",
    [
        Tile("Ready", f"min(livestate_ready{{{_WORKERS}}})", "short", _ALL, "1 where all chosen ones are.", 0),
        Tile(
            "Partitions", f"sum(livestate_partitions_assigned{{{_WORKERS}}})", "short", _ALL,
            "Assigned to the chosen workers.", 0,
        ),
        Tile(
            "Lag", f"sum(livestate_lag_events{{{_WORKERS}}})", "short", _below(10_000, 1_000_000), "Records to apply."
        ),
        Tile(
            "Busiest", f"max(rate(livestate_batch_seconds_sum{{{_WORKERS}}}[1m]))", "percentunit", _below(0.7, 0.9),
            "Share of its time that a worker spends in micro-batches.",
        ),
        Tile(
            "Oldest checkpoint", f"max(livestate:checkpoint_age:seconds{{{_WORKERS}}})", "s", _below(60, 300),
            "A restart applies the events since.",
        ),
        Tile(
            "Questions that fail",
            f"max(livestate:http_failed:ratio{{{_WORKERS}}}) or vector(0)", "percentunit", _below(0.001, 0.05),
            "Share of the questions under /v1 answered with a server's error.",
        ),
    ],
    [
        Section(
            "Applying events",
            [
                Graph(
                    "Events applied", "cps",
                    {"{{instance}}": f"rate(livestate_events_applied_total{{{_WORKERS}}}{_RATE})"}, stacked=True,
                ),
                Graph("Lag by partition", "short", {"{{partition}}": f"livestate_lag_events{{{_WORKERS}}}"}),
                Graph(
                    "Event to state, p99", "s",
                    {
                        "{{instance}}": _quantile(
                            0.99, "livestate_event_to_state_seconds", "instance, le", f"{{{_WORKERS}}}"
                        )
                    },
                ),
                Graph(
                    "Share of time in micro-batches", "percentunit",
                    {"{{instance}}": f"rate(livestate_batch_seconds_sum{{{_WORKERS}}}{_RATE})"},
                    "Near 1 the worker has no time left: add another one.", limit=0.9,
                ),
                Graph(
                    "Events in a micro-batch, mean", "short",
                    {"{{instance}}": _mean("livestate_batch_events", f"{{{_WORKERS}}}")},
                ),
                Graph(
                    "Waves in a micro-batch, mean", "short",
                    {"{{instance}}": _mean("livestate_batch_waves", f"{{{_WORKERS}}}")},
                    "As many as its busiest client has events in it.",
                ),
            ],
        ),
        Section(
            "Checkpoints and restores",
            [
                Graph(
                    "Checkpoint, p99", "s", {"{{instance}}": f"livestate:checkpoint_seconds:p99{{{_WORKERS}}}"}, limit=5
                ),
                Graph(
                    "Age of the last checkpoint", "s",
                    {"{{instance}}": f"livestate:checkpoint_age:seconds{{{_WORKERS}}}"}, limit=300,
                ),
                Graph(
                    "Rows written to the changelog", "cps",
                    {"{{instance}}": f"rate(livestate_checkpoint_rows_total{{{_WORKERS}}}{_RATE})"},
                ),
                Graph(
                    "Partitions by what is done", "short",
                    {
                        "{{instance}} serves": f"livestate_partitions_assigned{{{_WORKERS}}}",
                        "{{instance}} restores": f"livestate_partitions_restoring{{{_WORKERS}}}",
                        "{{instance}} rebuilds": f"livestate_partitions_rebuilding{{{_WORKERS}}}",
                    },
                ),
                Graph(
                    "Rows restored and events rebuilt", "cps",
                    {
                        "{{instance}} rows": f"rate(livestate_restored_rows_total{{{_WORKERS}}}{_RATE})",
                        "{{instance}} events": f"rate(livestate_rebuilt_events_total{{{_WORKERS}}}{_RATE})",
                    },
                ),
                Graph(
                    "Failures in 10 min", "short",
                    {
                        "checkpoints": f"sum(increase(livestate_checkpoint_failures_total{{{_WORKERS}}}[10m]))",
                        "torn versions": f"sum(increase(livestate_parameter_versions_torn_total{{{_WORKERS}}}[10m]))",
                        "rebalances": f"sum(increase(livestate_rebalances_total{{{_WORKERS}}}[10m]))",
                        "dead letters": f"sum(increase(livestate_dead_letters_total{{{_WORKERS}}}[10m])) or vector(0)",
                    },
                ),
            ],
        ),
        Section(
            "Questions by HTTP",
            [
                Graph(
                    "Questions", "reqps",
                    {"{{route}}": f"sum by (route) (rate(livestate_http_requests_total{{{_WORKERS}}}{_RATE}))"},
                ),
                Graph(
                    "Answers by status", "reqps",
                    {"{{status}}": f"sum by (status) (rate(livestate_http_requests_total{{{_WORKERS}}}{_RATE}))"},
                ),
                Graph(
                    "Time to answer, p99", "s",
                    {"{{route}}": _quantile(0.99, "livestate_http_request_seconds", "route, le", f"{{{_WORKERS}}}")},
                ),
            ],
        ),
    ],
    by_instance=True,
)  # fmt: skip

STORE = Board(
    "store",
    "store",
    "Rows of clients: where they lie, how they come and go.",
    [
        Tile("Clients", f'sum(livestate_rows{{{_WORKERS}, tier="all"}})', "short", _BLUE, "Live rows."),
        Tile("In memory", f'sum(livestate_rows{{{_WORKERS}, tier="memory"}})', "short", _BLUE, "Of the live rows."),
        Tile(
            "Looked for on disk", f"sum(rate(livestate_store_disk_reads_total{{{_WORKERS}}}[1m])) / "
            f"clamp_min(sum(rate(livestate_events_applied_total{{{_WORKERS}}}[1m])), 1)", "percentunit",
            _below(0.5, 2.0), "For each event applied. Much of it: raise store.memory_rows.",
        ),
        Tile(
            "Least disk free", f"min(livestate:disk_free:ratio{{{_WORKERS}}})", "percentunit", _above(0.05, 0.15),
            "Of the file systems that hold the data directories.", 0,
        ),
        Tile(
            "Most memory", f'max(process_resident_memory_bytes{{{_WORKERS}, job="livestate-worker"}})', "bytes", _BLUE,
            "Of a worker. Its container's limit is WORKER_MEMORY.",
        ),
        Tile(
            "Held events dropped", f"sum(increase(livestate_held_events_dropped_total{{{_WORKERS}}}[10m]))", "short",
            _below(1, 100), "Within ten minutes, for want of store.held_bytes.", 0,
        ),
    ],
    [
        Section(
            "Rows",
            [
                Graph("Rows by tier", "short", {"{{tier}}": f"sum by (tier) (livestate_rows{{{_WORKERS}}})"}),
                Graph(
                    "Rows by partition", "short", {"{{partition}}": f'livestate_rows{{{_WORKERS}, tier="all"}}'},
                    "Alike, unless client ids do not spread.",
                ),
                Graph(
                    "Rows changed since their checkpoint", "short",
                    {"{{instance}}": f"sum by (instance) (livestate_rows_unsaved{{{_WORKERS}}})"},
                ),
                Graph(
                    "Rows that come and go", "cps",
                    {
                        "admitted": f"sum(rate(livestate_rows_admitted_total{{{_WORKERS}}}{_RATE}))",
                        "ended by {{cause}}": f"sum by (cause) (rate(livestate_rows_ended_total{{{_WORKERS}}}{_RATE}))",
                    },
                ),
                Graph(
                    "Between memory and disk", "cps",
                    {
                        "left memory": f"sum(rate(livestate_rows_evicted_total{{{_WORKERS}}}{_RATE}))",
                        "looked for on disk": f"sum(rate(livestate_store_disk_reads_total{{{_WORKERS}}}{_RATE}))",
                    },
                ),
                Graph(
                    "Events dropped before their client has a row", "cps",
                    {"all": f"sum(rate(livestate_held_events_dropped_total{{{_WORKERS}}}{_RATE}))"},
                    "What store.held_bytes leaves no room for.",
                ),
            ],
        ),
        Section(
            "Room",
            [
                Graph(
                    "Memory", "bytes",
                    {
                        "{{instance}}": f'process_resident_memory_bytes{{{_WORKERS}, job="livestate-worker"}}',
                        "rows beyond their vectors": f"sum(livestate_store_overhead_bytes{{{_WORKERS}}})",
                    },
                ),
                Graph(
                    "Disk used", "bytes",
                    {
                        "{{instance}}": f"livestate_disk_used_bytes{{{_WORKERS}}}",
                        "copies of rows that left memory": f"sum(livestate_store_scratch_bytes{{{_WORKERS}}})",
                    },
                ),
                Graph("Disk free", "bytes", {"{{instance}}": f"livestate_disk_free_bytes{{{_WORKERS}}}"}),
            ],
        ),
    ],
    by_instance=True,
)  # fmt: skip

TRAINER = Board(
    "trainer",
    "trainer and quality",
    "What is learned, how good it is, and how soon it serves.",
    [
        Tile("Ready", 'min(livestate_ready{job="livestate-trainer"})', "short", _ALL, "1 where the trainer is.", 0),
        Tile(
            "Behind by", "max(livestate_trainer_lag_seconds)", "s", _below(5, 30),
            "Age of the oldest event or feedback that waits for the trainer.",
        ),
        Tile(
            "Worst AUC", "min(livestate_prequential_auc)", "none", _above(0.5, 0.55),
            "Of predictions before learning; a half is chance.", 3,
        ),
        Tile(
            "Loss against its past",
            "max(livestate_prequential_log_loss / avg_over_time(livestate_prequential_log_loss[1d]))", "percentunit",
            _below(1.1, 1.25), "Log loss of the worst task against its mean of a day.", 0,
        ),
        Tile(
            "Feedback to served, p99", "livestate:feedback_to_served_seconds:p99 >= 0 or vector(0)", "s", _below(1, 5),
            "0 where none came.",
        ),
        Tile(
            "Versions that failed", "sum(increase(livestate_parameter_publish_failures_total[10m]))", "short",
            _below(1, 10), "Transactions within ten minutes that are tried again.", 0,
        ),
    ],
    [
        Section(
            "Quality",
            [
                Graph(
                    "AUC before learning", "none", {"{{task}} {{head}}": "livestate_prequential_auc"},
                    "A half is chance.",
                ),
                Graph(
                    "Log loss before learning", "none",
                    {
                        "{{task}} {{head}}": "livestate_prequential_log_loss",
                        "{{task}}, a quarter above a day's mean":
                            "1.25 * avg_over_time(livestate_prequential_log_loss[1d])",
                    },
                ),
                Graph(
                    "Learned", "cps",
                    {
                        "{{task}}": f"sum by (task) (rate(livestate_examples_learned_total{_RATE}))",
                        "not finite": f"sum(rate(livestate_examples_dropped_total{_RATE})) or vector(0)",
                        "events too late to ask": f"sum(rate(livestate_late_predictions_total{_RATE})) or vector(0)",
                    },
                ),
                Graph(
                    "Guard", "short",
                    {
                        "{{task}} is held back": "livestate_trainer_guard_holding",
                        "{{task}} went back": "increase(livestate_trainer_guard_returns_total[10m])",
                        "versions without {{task}}": "increase(livestate_trainer_guard_held_back_versions_total[10m])",
                        "{{task}}, evidence (log10)": "livestate_trainer_guard_evidence_log10",
                    },
                    "What speaks for a head being worse than its good state; held back from log10 of "
                    "trainer.guard_false_alarm_labels on, 8 by default.",
                ),
            ],
        ),
        Section(
            "Joining",
            [
                Graph(
                    "Feedback by outcome", "cps",
                    {"{{outcome}}": f"sum by (outcome) (rate(livestate_feedback_total{_RATE}))"}, stacked=True,
                ),
                Graph(
                    "Waiting", "short",
                    {
                        "predictions for feedback": "livestate_pending_examples",
                        "feedback for its event": "livestate_pending_feedback",
                        "labels for their window": "livestate_held_labels",
                    },
                ),
                Graph("Records that wait", "short", {"{{topic}}": "livestate_trainer_lag_events"}),
                Graph("Age of the oldest one", "s", {"fetched and not taken": "livestate_trainer_lag_seconds"}),
                Graph(
                    "Share of labels learned from", "percentunit",
                    {"of those that came": "livestate_trainer_label_share"},
                    "Below all of them while the trainer is behind and trainer.when_behind is sample.",
                ),
            ],
        ),
        Section(
            "Publishing",
            [
                Graph(
                    "Feedback to served", "s",
                    {
                        "p50": _quantile(0.5, "livestate_feedback_to_served_seconds", window="[5m]"),
                        "p99": _quantile(0.99, "livestate_feedback_to_served_seconds", window="[5m]"),
                    },
                    limit=5,
                ),
                Graph(
                    "Versions a minute", "short",
                    {
                        "published": f"60 * sum(rate(livestate_parameter_versions_published_total{_RATE}))",
                        "{{instance}} applied": f"60 * rate(livestate_parameter_versions_applied_total{_RATE})",
                    },
                ),
                Graph(
                    "Publishing and checkpoint, p99", "s",
                    {
                        "a version": _quantile(0.99, "livestate_parameter_publish_seconds", window="[5m]"),
                        "a checkpoint": _quantile(0.99, "livestate_trainer_checkpoint_seconds", window="[10m]"),
                    },
                ),
                Graph(
                    "Events the trainer applied", "cps", {"events": f"sum(rate(livestate_trainer_events_total{_RATE}))"}
                ),
                Graph(
                    "Stream time", "dateTimeAsIso",
                    {"largest event time": "1000 * (livestate_stream_timestamp_seconds > 0)"},
                ),
                Graph("Taking over", "short", {"{{instance}}": "livestate_trainer_taking_over"}, "1 during a rebuild."),
            ],
        ),
    ],
)  # fmt: skip

BOARDS = (OVERVIEW, WORKER, STORE, TRAINER)


def text_of(board: Board) -> str:
    """The file of a board."""
    return json.dumps(board.as_json(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for one in BOARDS:
        (DIRECTORY / f"{one.name}.json").write_text(text_of(one), encoding="utf-8")
