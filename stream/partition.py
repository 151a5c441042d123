"""One partition of a serving worker: its rows, how far its input was applied, and what it has to publish.

Guaranteed: rows and position move together; a block that does not follow the last one is not applied, so no event is
passed over. Rows that were ahead of the position (after a crash) skip the events they have, and the embeddings of their
clients are published again, so readers of the embeddings topic have every client as it is. A row expires at the event
at which it would expire if events came one at a time, wherever the batches are cut. Not guaranteed: a prediction made
between a client's first and last event of a block, where a crash comes before the broker has confirmed it and after
the row was written to disk for want of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.frequency import FrequencyFilter, event_ttls
from stream.model.engine import Advanced, Engine
from stream.model.heads import Head, Questions
from stream.model.kernels import expiry_parts
from stream.store import EmbeddingStore, Lookup, PackedKeys
from stream.transport import FetchedBlock
from stream.wire import EmbeddingEncoder, EventColumns, EventDecoder, PackedValues, RecordBlock, Rejected

__all__ = ["Applied", "Partition", "Served", "Serving"]


@dataclass(frozen=True)
class Served:
    """Everything a partition needs to turn events into embeddings, replaced as a whole between batches."""

    engine: Engine
    questions: Questions
    heads: dict[str, Head]
    version: int

    def vectors(self, rows: NDArray[np.float32], now_ms: NDArray[np.int64]) -> NDArray[np.float32]:
        """What `model.vector` says that rows, (n, width), are published as at times (n,)."""
        layout = self.engine.layout
        hidden = rows[:, : layout.hidden]
        if layout.settings.model.vector != "features":
            return hidden
        return self.questions.readout.features(hidden, rows[:, layout.hidden :], now_ms)


@dataclass
class Serving:
    """What all rows of one trunk are served with; whoever has rows of it finds the latest here.

    `latest` is replaced as a whole, between micro-batches, by another of the same engine, or of an online trunk's later
    one.
    """

    latest: Served


@dataclass(frozen=True)
class Applied:
    """What one block led to: embeddings to publish and to delete, records to dead-letter, and counts."""

    #: In order: clients and their embedding records, or clients whose embeddings are to be deleted.
    embeddings: list[tuple[PackedKeys, PackedValues | None]]
    rejected: list[tuple[RecordBlock, list[Rejected]]]
    events: int
    replayed: int
    waves: int


class _Done:
    """What the parts of one block came to so far."""

    def __init__(self, silently: bool) -> None:
        self.silently = silently
        self.given = self.events = self.waves = 0
        self._embeddings: list[tuple[PackedKeys, PackedValues | None]] = []
        self._keys: list[PackedKeys] = []
        self._values: list[PackedValues] = []

    def publish(self, keys: PackedKeys, values: PackedValues) -> None:
        if len(keys):
            self._keys.append(keys)
            self._values.append(values)

    def end(self, clients: list[bytes]) -> None:
        """Delete embeddings, after those that were published so far."""
        if clients and not self.silently:
            self.embeddings().append((PackedKeys.from_list(clients), None))

    def embeddings(self) -> list[tuple[PackedKeys, PackedValues | None]]:
        if self._keys:
            self._embeddings.append((PackedKeys.concatenate(self._keys), PackedValues.concatenate(self._values)))
            self._keys, self._values = [], []
        return self._embeddings


class Partition:
    """Applies blocks to the rows of one partition.

    Parameters
    ----------
    store: the partition's rows, open.
    position: next input offset to apply.
    """

    def __init__(
        self,
        number: int,
        store: EmbeddingStore,
        position: int,
        decoder: EventDecoder,
        encoder: EmbeddingEncoder,
    ) -> None:
        self.number = number
        self.store = store
        # The first call starts the record of rows that `max_rows` ends.
        store.take_capped()
        self.position = position
        self._decoder = decoder
        self._encoder = encoder
        self._ttl_ms = event_ttls(store.options)
        self._filter = FrequencyFilter(store, decoder) if store.options.admission_threshold > 1 else None

    def follows(self, block: FetchedBlock) -> bool:
        """Whether the block begins where the last one ended."""
        return block.start == self.position

    def apply(self, block: FetchedBlock, served: Served, *, silently: bool = False) -> Applied:
        """Advance the rows by a block that follows the last one.

        silently: make no embeddings, for rows that are not served yet.
        """
        columns = self._decoder.decode(block.records)
        done = _Done(silently)
        held_back: list[tuple[RecordBlock, list[Rejected]]] = []
        if self._filter is None:
            accepted = np.flatnonzero(columns.accepted)
            if len(accepted):
                self._advance(columns, accepted, served, done, expire=True)
                self.store.advance_watermark(int(columns.timestamp_ms[accepted].max()))
        else:
            for piece in self._filter.admit(block.records, columns):
                done.end(piece.gone)
                if not len(piece.events):
                    continue
                self._advance(piece.columns, piece.events, served, done, expire=False)
                if piece.columns is not columns and piece.columns.rejected:
                    held_back.append((piece.records, piece.columns.rejected))
        self.position = block.end
        return Applied(
            done.embeddings(),
            [(block.records, columns.rejected), *held_back],
            done.events,
            done.given - done.events,
            done.waves,
        )

    def _advance(
        self,
        columns: EventColumns,
        accepted: NDArray[np.int64],
        served: Served,
        done: _Done,
        *,
        expire: bool,
    ) -> None:
        is_whole = len(accepted) == columns.n
        keys = columns.keys if is_whole else columns.keys.take(accepted)
        # Of several parts, the first ones' states are written before the last one's events are applied.
        written_last = served.engine.layout.hidden if self.store.longest_ttl_ms is None else 0
        with self.store.update(keys, written_last=written_last) as found:
            slots = found
            if not is_whole:
                slots = np.full(columns.n, -1, np.int64)
                slots[accepted] = found
            for part in self._parts(columns, slots, accepted) if expire else (slots,):
                self._prolong(columns, part)
                advanced = served.engine.prepare(columns, part, self.store)
                if not done.silently:
                    done.publish(*self._publish(columns, part, advanced, served))
                done.events += advanced.events
                done.waves += advanced.waves
                served.engine.settle(advanced, self.store)
        done.given += len(accepted)

    def embeddings(self, keys: PackedKeys, found: Lookup, served: Served) -> PackedValues:
        """Embedding records of rows as they are, without predictions."""
        return self._encoder.encode(
            keys,
            found.last_event_ms,
            found.applied_offset,
            served.version,
            found.events_seen,
            served.vectors(found.vectors, found.last_event_ms),
            np.full((len(keys), len(served.questions.outputs)), np.nan, np.float32),
        )

    def sweep(self, budget_ms: float) -> list[bytes]:
        """End expired rows for about `budget_ms`; returns the clients whose embeddings are to be deleted."""
        return self.store.sweep(budget_ms) + self.store.take_capped()

    def _prolong(self, columns: EventColumns, slots: NDArray[np.int64]) -> None:
        """Let each event that will be applied keep its row alive for as long as its modality says."""
        if self._ttl_ms is None:
            return
        at = np.flatnonzero(slots >= 0)
        at = at[columns.offsets[at] > self.store.applied_offset[slots[at]]]
        self.store.prolong(slots[at], columns.timestamp_ms[at], self._ttl_ms[columns.modality[at]])

    def _parts(
        self, columns: EventColumns, slots: NDArray[np.int64], accepted: NDArray[np.int64]
    ) -> Iterator[NDArray[np.int64]]:
        """Slots of the events of each part of the batch, -1 for the others, rows expired before it reset.

        Without a time to live the batch is one part. With one, a new part begins where a row expires between
        two of its own events.
        """
        ttl_ms = self.store.longest_ttl_ms
        if ttl_ms is None:
            yield slots
            return
        distinct, client = np.unique(slots[accepted], return_inverse=True)
        part, expires, watermark = expiry_parts(
            client,
            columns.timestamp_ms[accepted],
            self._kept(columns, accepted),
            columns.offsets[accepted] > self.store.applied_offset[slots[accepted]],
            self.store.events_seen[distinct] > 0,
            self.store.aged(distinct),
            self.store.watermark_ms,
            ttl_ms,
        )
        for number in range(int(part[-1]) + 1):
            reset = accepted[(part == number) & expires]
            if len(reset):
                self.store.reset_expired(slots[reset], watermark[np.searchsorted(accepted, reset)])
            chosen = np.full(len(slots), -1, np.int64)
            inside = accepted[part == number]
            chosen[inside] = slots[inside]
            yield chosen

    def _kept(self, columns: EventColumns, at: NDArray[np.int64]) -> NDArray[np.int64]:
        timestamps = columns.timestamp_ms[at]
        return (
            timestamps if self._ttl_ms is None else self.store.aged_at(timestamps, self._ttl_ms[columns.modality[at]])
        )

    def _publish(
        self,
        columns: EventColumns,
        slots: NDArray[np.int64],
        advanced: Advanced,
        served: Served,
    ) -> tuple[PackedKeys, PackedValues]:
        """One embedding for each client of the batch as it is after it, and one for each prediction on the way.

        Rows have their hidden states of before still.
        """
        store, triggers = self.store, advanced.triggers
        width = served.engine.layout.hidden
        predictions = served.questions.predict(served.heads, columns, triggers)
        final_slots, final_event, final_hidden = advanced.slots, advanced.last_event, advanced.hidden
        if advanced.events < np.count_nonzero(slots >= 0):
            given = np.flatnonzero(slots >= 0)
            # Clients whose events were all replayed are published again, as they are.
            slot, first = np.unique(slots[given], return_index=True)
            again = ~np.isin(slot, advanced.slots) & (store.events_seen[slot] > 0)
            final_slots = np.concatenate([final_slots, slot[again]])
            final_event = np.concatenate([final_event, given[first[again]]])
            final_hidden = np.concatenate([final_hidden, store.vectors[slot[again], :width]])
        # A prediction at a client's last event of the batch goes out with its final embedding.
        final_predictions = np.full((len(final_slots), predictions.shape[1]), np.nan, np.float32)
        passing = triggers.event[:0]
        if len(triggers.event):
            final_row = np.full(columns.n, -1, np.int64)
            final_row[advanced.last_event] = np.arange(len(advanced.last_event))
            row = final_row[triggers.event]
            final_predictions[row[row >= 0]] = predictions[row >= 0]
            passing = np.flatnonzero(row < 0)
        passed = triggers.event[passing]
        hidden = _joined(triggers.hidden[passing], final_hidden)
        vectors = hidden
        now_ms = _joined(columns.timestamp_ms[passed], store.last_event_ms[final_slots])
        if served.engine.layout.settings.model.vector == "features":
            memory = _joined(triggers.memory[passing], store.vectors[final_slots, width:])
            vectors = served.questions.readout.features(hidden, memory, now_ms)
        keys = columns.keys.take(_joined(passed, final_event))
        records = self._encoder.encode(
            keys,
            now_ms,
            _joined(columns.offsets[passed], store.applied_offset[final_slots]),
            served.version,
            _joined(triggers.events_seen[passing], store.events_seen[final_slots]),
            vectors,
            _joined(predictions[passing], final_predictions),
        )
        return keys, records


def _joined(passing: NDArray[Any], final: NDArray[Any]) -> NDArray[Any]:
    # Where nothing is predicted at passing events, as in most batches, nothing is copied.
    return np.concatenate([passing, final]) if len(passing) else final
