"""One partition of a serving worker: its rows, how far its input was applied, and what it has to publish.

Guaranteed: rows and position move together; a block that does not follow the last one is not applied, so no
event is passed over. Rows that were ahead of the position (after a crash) skip the events they have, and the
embeddings of their clients are published again, so readers of the embeddings topic miss nothing. A row expires
at the event at which it would expire if events came one at a time, wherever the batches are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.model.engine import Advanced, Engine
from stream.model.heads import LogisticHead, Questions
from stream.model.kernels import expiry_parts
from stream.store import EmbeddingStore
from stream.transport import FetchedBlock
from stream.wire import EmbeddingEncoder, EventColumns, EventDecoder, Rejected

__all__ = ["Applied", "Partition", "Served"]


@dataclass(frozen=True)
class Served:
    """Everything a partition needs to turn events into embeddings, replaced as a whole between batches."""

    engine: Engine
    questions: Questions
    heads: dict[str, LogisticHead]
    version: int


@dataclass(frozen=True)
class Applied:
    """What one block led to: embedding records to publish, records to dead-letter, and counts."""

    keys: list[bytes]
    embeddings: list[bytes]
    rejected: list[Rejected]
    events: int
    replayed: int
    waves: int


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

    def follows(self, block: FetchedBlock) -> bool:
        """Whether the block begins where the last one ended."""
        return block.start == self.position

    def apply(self, block: FetchedBlock, served: Served) -> Applied:
        """Advance the rows by a block that follows the last one."""
        columns = self._decoder.decode(block.records)
        accepted = np.flatnonzero(columns.accepted)
        keys: list[bytes] = []
        embeddings: list[bytes] = []
        events = waves = 0
        if len(accepted):
            slots = np.full(columns.n, -1, np.int64)
            with self.store.update(columns.keys.take(accepted)) as found:
                slots[accepted] = found
                for part in self._parts(columns, slots, accepted):
                    advanced = served.engine.advance(columns, part, self.store)
                    published = self._publish(columns, part, advanced, served)
                    keys += published[0]
                    embeddings += published[1]
                    events += advanced.events
                    waves += advanced.waves
            self.store.advance_watermark(int(columns.timestamp_ms[accepted].max()))
        self.position = block.end
        return Applied(keys, embeddings, columns.rejected, events, len(accepted) - events, waves)

    def sweep(self, budget_ms: float) -> list[bytes]:
        """End expired rows for about `budget_ms`; returns the clients whose embeddings are to be deleted."""
        return self.store.sweep(budget_ms) + self.store.take_capped()

    def _parts(
        self, columns: EventColumns, slots: NDArray[np.int64], accepted: NDArray[np.int64]
    ) -> Iterator[NDArray[np.int64]]:
        """Slots of the events of each part of the batch, -1 for the others, rows expired before it reset.

        Without a time to live the batch is one part. With one, a new part begins where a row expires between
        two of its own events.
        """
        ttl_ms = self.store.options.ttl_ms
        if ttl_ms is None:
            yield slots
            return
        distinct, client = np.unique(slots[accepted], return_inverse=True)
        part, expires, watermark = expiry_parts(
            client,
            columns.timestamp_ms[accepted],
            columns.offsets[accepted] > self.store.applied_offset[slots[accepted]],
            self.store.events_seen[distinct] > 0,
            self.store.last_event_ms[distinct],
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

    def _publish(
        self,
        columns: EventColumns,
        slots: NDArray[np.int64],
        advanced: Advanced,
        served: Served,
    ) -> tuple[list[bytes], list[bytes]]:
        """One embedding for each client of the batch as it is now, and one for each prediction on the way."""
        store, triggers = self.store, advanced.triggers
        predictions = served.questions.predict(served.heads, columns, triggers)
        final_slots, final_event = advanced.slots, advanced.last_event
        given = np.flatnonzero(slots >= 0)
        if advanced.events < len(given):
            # Clients whose events were all replayed are published again, as they are.
            slot, first = np.unique(slots[given], return_index=True)
            again = ~np.isin(slot, advanced.slots) & (store.events_seen[slot] > 0)
            final_slots = np.concatenate([final_slots, slot[again]])
            final_event = np.concatenate([final_event, given[first[again]]])
        # A prediction at a client's last event of the batch goes out with its final embedding.
        is_final = np.isin(triggers.event, advanced.last_event)
        final_predictions = np.full((len(final_slots), predictions.shape[1]), np.nan, np.float32)
        if is_final.any():
            of_event = {int(event): row for row, event in enumerate(final_event[: len(advanced.last_event)])}
            for trigger in np.flatnonzero(is_final):
                final_predictions[of_event[int(triggers.event[trigger])]] = predictions[trigger]
        passing = ~is_final
        event = np.concatenate([triggers.event[passing], final_event])
        hidden = np.concatenate([triggers.hidden[passing], store.vectors[final_slots, : served.engine.layout.hidden]])
        vectors = hidden
        now_ms = np.concatenate([columns.timestamp_ms[triggers.event[passing]], store.last_event_ms[final_slots]])
        if served.engine.layout.settings.model.vector == "features":
            memory = np.concatenate(
                [triggers.memory[passing], store.vectors[final_slots, served.engine.layout.hidden :]]
            )
            vectors = served.questions.readout.features(hidden, memory, now_ms)
        keys = columns.keys.take(event)
        records = self._encoder.encode(
            keys,
            now_ms,
            np.concatenate([columns.offsets[triggers.event[passing]], store.applied_offset[final_slots]]),
            served.version,
            np.concatenate([triggers.events_seen[passing], store.events_seen[final_slots]]),
            vectors,
            np.concatenate([predictions[passing], final_predictions]),
        )
        return keys.to_list(), records
