"""Whether topics and disks tell the truth, after whatever has happened.

The truth is recomputed from the events topic (`tests.support.truth.OnePass`). Checked against it, bit for bit:
every row ever written to the changelog, the changelog's last rows, every embedding and prediction, the last
embedding of each client, the rows on each worker's disk, and every dead letter.

Counted and not held against anybody: embeddings and dead letters written twice, which carry the same offset, as
a crash makes some be; and predictions that are missing. A row may reach the disk, to make room in memory, before the
predictions on the way to it are confirmed; after a crash its events are skipped, and only its last embedding is
published again. Where nothing crashed, callers check that none is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from confluent_kafka import Message

from stream.changelog import META_KEY, PartitionMeta
from stream.checkpoint import META_NAME, LocalMeta
from stream.restore import store_options
from stream.store import EmbeddingStore
from stream.store.rows import decode_rows
from stream.wire import decode_embedding
from tests.fault.site import Site
from tests.support.truth import (
    OnePass,
    State,
    Truth,
    block_of,
    changelog_states,
    record_digest,
    store_states,
    topic_batches,
)

__all__ = ["Report", "verify"]

_SHOWN = 20


@dataclass
class Report:
    """What was found. `problems`: where the topics do not tell the truth, in words; the first ones."""

    events: int = 0
    bad_records: int = 0
    clients: int = 0
    expired: int = 0
    changelog_rows: int = 0
    embeddings: int = 0
    embeddings_again: int = 0
    predictions: int = 0
    predictions_missing: int = 0
    dead_letters: int = 0
    dead_letters_again: int = 0
    disk_rows: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Note one more."""
        self.wrong += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(text)

    def figures(self) -> dict[str, Any]:
        """Everything but the words."""
        return {name: value for name, value in asdict(self).items() if name != "problems"}


def verify(site: Site, *, aborted_are_hidden: bool) -> Report:
    """Check a site whose workers have all been stopped.

    Parameters
    ----------
    aborted_are_hidden: whether the broker hides records of aborted transactions. If not, what a worker restores
        from the changelog is checked, and not each record by itself.
    """
    report = Report()
    rejected: dict[tuple[int, int], tuple[str, bytes]] = {}
    for partition in range(site.settings.topics.partitions):
        passed = OnePass(site.settings, site.parameters, site.versions)
        for messages in topic_batches(site.settings, site.settings.topics.events, partition):
            passed.feed(block_of(messages))
        truth = passed.truth()
        report.events += truth.events
        report.bad_records += len(truth.rejected)
        report.clients += len(truth.states)
        report.expired += len(truth.expired)
        rejected |= {(partition, offset): why for offset, why in truth.rejected.items()}
        _check_restored(site, partition, truth, report)
        _check_changelog(site, partition, truth, report, aborted_are_hidden)
        _check_embeddings(site, partition, truth, report)
        _check_disks(site, partition, truth, report)
    _check_dead_letters(site, rejected, report)
    return report


def _check_restored(site: Site, partition: int, truth: Truth, report: Report) -> None:
    states, position = changelog_states(site.settings, site.layout, partition)
    if position != truth.end:
        report.problem(f"partition {partition} was applied up to {position} of {truth.end}")
    _compare(f"changelog partition {partition}", states, truth, report)


def _compare(where: str, states: dict[bytes, State], truth: Truth, report: Report) -> None:
    for key in states.keys() - truth.states.keys():
        report.problem(f"{where} has {key!r}, which {'has expired' if key in truth.expired else 'never was'}")
    for key, state in truth.states.items():
        if states.get(key) != state:
            report.problem(f"{where}: the row of {key!r} is {_short(states.get(key))}, not {_short(state)}")


def _short(state: State | None) -> str:
    if state is None:
        return "missing"
    return f"(offset {state.applied_offset}, {state.events_seen} events, {state.digest.hex()[:8]})"


def _check_changelog(site: Site, partition: int, truth: Truth, report: Report, aborted_are_hidden: bool) -> None:
    """Each row is the state right after its offset, and positions never go back."""
    last: dict[bytes, bytes | None] = {}
    position = 0
    for messages in topic_batches(site.settings, site.settings.topics.changelog, partition):
        rows = [message for message in messages if message.key() and message.value() is not None]
        report.changelog_rows += len(rows)
        for message, state in zip(rows, _states(site, rows), strict=True):
            # A row that was renewed for an event it had applied before is empty until its next event.
            if state.events_seen and truth.digests.get((message.key(), state.applied_offset)) != state.digest:
                report.problem(f"changelog offset {message.offset()}: {message.key()!r} never was {_short(state)}")
        for message in messages:
            if (message.key() or META_KEY) != META_KEY:
                last[message.key()] = message.value()
            elif aborted_are_hidden:
                found = PartitionMeta.decode(message.value()).position
                if found < position:
                    report.problem(f"changelog offset {message.offset()}: position {found} after {position}")
                position = found
    if aborted_are_hidden:
        # What compaction leaves.
        live = {key: value for key, value in last.items() if value is not None}
        kept = dict(zip(live, _rows(site, list(live.values())), strict=True))
        _compare(f"compacted changelog partition {partition}", kept, truth, report)


def _states(site: Site, messages: list[Message]) -> list[State]:
    return _rows(site, [message.value() for message in messages])


def _rows(site: Site, values: list[bytes]) -> list[State]:
    if not values:
        return []
    meta, floats = decode_rows(values, site.layout.width, 0, "changelog")
    return [
        State(row.tobytes(), int(seen), int(last_ms), int(offset))
        for row, (seen, last_ms, offset) in zip(floats, meta[:, :3], strict=True)
    ]


def _check_embeddings(site: Site, partition: int, truth: Truth, report: Report) -> None:
    newest: dict[bytes, int] = {}
    last: dict[bytes, int | None] = {}
    written: set[tuple[bytes, int]] = set()
    answered: set[tuple[bytes, int]] = set()
    tasks = list(site.settings.tasks)
    for messages in topic_batches(site.settings, site.settings.topics.embeddings, partition):
        for message in messages:
            key, value = message.key(), message.value()
            if value is None:
                last[key] = None
                continue
            e = decode_embedding(value)
            at = key, e.offset
            where = f"embedding of {key!r} at offset {e.offset}, version {e.parameter_version}"
            report.embeddings += 1
            report.embeddings_again += at in written
            written.add(at)
            newest[key] = max(e.offset, newest.get(key, -1))
            last[key] = e.offset
            if truth.hidden.get(at) != e.vector.tobytes():
                report.problem(f"{where}: the vector is not the state right after that event")
            if e.parameter_version not in site.versions:
                report.problem(f"{where}: there is no such version")
            elif e.predictions:
                answered.add(at)
                expected = truth.predictions.get(at, {}).get(e.parameter_version)
                got = np.array([e.predictions.get(task, np.nan) for task in tasks], np.float32)
                # A product over more rows at once may differ in its last bit.
                if expected is None or not np.allclose(got, expected, rtol=1e-6, atol=0.0, equal_nan=True):
                    report.problem(f"{where}: predictions {e.predictions} are not those of that version, {expected}")
    report.predictions += len(answered)
    report.predictions_missing += len(truth.predictions.keys() - answered)
    for key, state in truth.states.items():
        if newest.get(key, -1) != state.applied_offset:
            report.problem(f"{key!r}: the newest embedding is of {newest.get(key)}, not of {state.applied_offset}")
        elif last[key] != state.applied_offset:
            report.problem(f"{key!r}: the last embedding is of {last[key]}, after one of {state.applied_offset}")
    for key in truth.expired:
        if last.get(key) is not None:
            report.problem(f"{key!r} has expired, and its embedding of offset {last[key]} was not deleted")


def _check_disks(site: Site, partition: int, truth: Truth, report: Report) -> None:
    """Whatever lies on a worker's disk once was true; of the partition's last owner, it is the whole truth."""
    owners = 0
    # A partition's directory may name its trunk too.
    places = [
        (worker.name, path)
        for worker in site.workers.values()
        for path in sorted(worker.data_dir.glob(f"partition-{partition}*"))
        if path.name.split("-")[1] == str(partition)
    ]
    for name, path in places:
        with EmbeddingStore.open(path, store_options(site.settings, site.layout.width)) as store:
            stored = store.meta(META_NAME)
            if stored is None:
                continue
            states = store_states(store)
            report.disk_rows += len(states)
            where = f"disk of worker {name}, partition {partition}"
            if LocalMeta.decode(stored).partition.position == truth.end:
                owners += 1
                _compare(where, states, truth, report)
            for key, state in states.items():
                if state.events_seen and truth.digests.get((key, state.applied_offset)) != state.digest:
                    report.problem(f"{where}: {key!r} never was {_short(state)}")
    if not owners:
        report.problem(f"no worker's disk has partition {partition} up to its end, {truth.end}")


def _check_dead_letters(site: Site, rejected: dict[tuple[int, int], tuple[str, bytes]], report: Report) -> None:
    """Exactly the records that are no events, as they were received, with the reason and where they came from."""
    found: set[tuple[int, int]] = set()
    for letter in _letters(site):
        headers = dict(letter.headers() or [])
        at = int(headers["livestate-partition"]), int(headers["livestate-offset"])
        report.dead_letters += 1
        report.dead_letters_again += at in found
        found.add(at)
        content = headers["livestate-reason"].decode(), record_digest(letter.key(), letter.value())
        if rejected.get(at) != content:
            report.problem(f"the dead letter of {at}, {content[0]}, should be {rejected.get(at, ('none', b''))[0]}")
        if not headers["livestate-detail"] or headers["livestate-topic"].decode() != site.settings.topics.events:
            report.problem(f"the dead letter of {at} does not say why or whence: {headers}")
    for at in rejected.keys() - found:
        report.problem(f"the record at {at}, {rejected[at][0]}, is in no dead letter")


def _letters(site: Site) -> Iterable[Message]:
    for messages in topic_batches(site.settings, site.settings.topics.dead_letters, 0):
        yield from messages
