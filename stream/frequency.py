"""Frequency filtering in front of a partition's rows: a client gets a row at its n-th event.

Guaranteed: the events before the n-th are held on disk with the client and applied, in order, right before it, so the
row is the one it would have been without a filter, wherever the batches are cut; what is held travels with
checkpoints and is counted once per offset. A client that expires before it is admitted starts counting from zero.
Not guaranteed: that everything is held. `store.held_bytes` bounds it for each client; the oldest events are dropped,
and counted, beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.store import FOR_EVER, EmbeddingStore, StoreOptions
from stream.wire import EventColumns, EventDecoder, RecordBlock
from stream.wire.block import Headers

__all__ = ["Admitted", "FrequencyFilter", "event_ttls"]


def event_ttls(options: StoreOptions) -> NDArray[np.int64] | None:
    """How long an event of each modality keeps a row alive, (modalities,); None where all do for equally long."""
    if not options.event_ttls_ms:
        return None
    return np.array([FOR_EVER if ttl is None else ttl for ttl in options.event_ttls_ms], np.int64)


@dataclass(frozen=True)
class Admitted:
    """Events to apply: decoded records, and which of them are events of clients that have a row.

    `gone`: clients that have no row any more, and had one before these events.
    """

    records: RecordBlock
    columns: EventColumns
    events: NDArray[np.int64]
    gone: list[bytes]


class FrequencyFilter:
    """Decides which events of a block are applied, and brings back those held for clients that it admits.

    Parameters
    ----------
    store: with `admission_threshold` above 1, in exact mode.
    """

    def __init__(self, store: EmbeddingStore, decoder: EventDecoder) -> None:
        self._store = store
        self._decoder = decoder
        self._ttl_ms = event_ttls(store.options)

    def admit(self, records: RecordBlock, columns: EventColumns) -> Iterator[Admitted]:
        """Pieces of a block, in order; each has to be applied before the next is asked for.

        Within a piece no row expires: what expires does so between pieces, the watermark having moved.
        """
        left = np.flatnonzero(columns.accepted)
        while len(left):
            keys = columns.keys.take(left)
            admission = self._store.observe(
                keys,
                columns.offsets[left],
                columns.timestamp_ms[left],
                _Payloads(records, left),
                None if self._ttl_ms is None else self._ttl_ms[columns.modality[left]],
            )
            piece, left = left[: admission.stop], left[admission.stop :]
            own = piece[admission.admitted[: admission.stop]]
            held = [_unpack(payload) for _, payloads in admission.released for payload in payloads]
            if held:
                clients = [keys[i] for i, some in admission.released for _ in some]
                merged = _merge(records, own, clients, held)
                # They were decoded before, but under settings that may have been others.
                decoded = self._decoder.decode(merged)
                yield Admitted(merged, decoded, np.flatnonzero(decoded.accepted), admission.gone)
            else:
                yield Admitted(records, columns, own, admission.gone)
            self._store.advance_watermark(int(columns.timestamp_ms[piece].max()))


@dataclass(frozen=True)
class _Held:
    """A held record: its offset and Kafka timestamp, value and headers."""

    offset: int
    timestamp_ms: int
    value: bytes
    headers: Headers


class _Payloads(Sequence[bytes]):
    """What is to be held of each event of a piece, made only when it is asked for."""

    def __init__(self, records: RecordBlock, piece: NDArray[np.int64]) -> None:
        self._records = records
        self._piece = piece

    def __len__(self) -> int:
        return len(self._piece)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = int(self._piece[index])
        records = self._records
        packed: bytes = msgpack.packb(
            [
                int(records.offsets[at]),
                int(records.timestamps_ms[at]),
                records.value(at),
                [[name, value] for name, value in records.headers_of(at)],
            ]
        )
        return packed


def _unpack(payload: bytes) -> _Held:
    offset, timestamp_ms, value, headers = msgpack.unpackb(payload)
    return _Held(offset, timestamp_ms, value, tuple((name, content) for name, content in headers))


def _merge(records: RecordBlock, own: NDArray[np.int64], clients: list[bytes], held: list[_Held]) -> RecordBlock:
    """Held records and the block's own at `own`, by offset."""
    rows: list[tuple[int, int, bytes | None, bytes | None, Headers]] = [
        (one.offset, one.timestamp_ms, client, one.value, one.headers)
        for client, one in zip(clients, held, strict=True)
    ]
    rows += [
        (
            int(records.offsets[at]),
            int(records.timestamps_ms[at]),
            records.key(at),
            records.value(at),
            records.headers_of(at),
        )
        for at in own.tolist()
    ]
    rows.sort(key=lambda row: row[0])
    offsets, times, keys, values, headers = zip(*rows, strict=True)
    return RecordBlock.from_lists(keys, values, offsets, times, headers)
