"""The clients of this worker's partitions, as HTTP serves them.

Guaranteed: a view is one row at one instant, between two micro-batches, with the predictions that the heads of one
parameter version make of it. Rows are found, and JSON is made of them, on threads of their own and in short pieces, so
that a large question holds up neither the event loop nor a micro-batch for long. Small questions that come while
others are answered are answered together, as most of what one costs does not grow with its clients.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.errors import StoreError
from stream.owned import OwnedPartition
from stream.partition import Partition, Served
from stream.partitioner import partition_of
from stream.settings import Settings
from stream.store import Lookup, PackedKeys

__all__ = ["ClientView", "Clients"]

#: Rows that one lookup takes: a micro-batch of the same partition waits for it.
_CHUNK = 128
#: Clients of a question that is answered together with others.
_SMALL = 16


class ClientView(msgspec.Struct, frozen=True):
    """A client's state as served.

    timestamp_ms, offset: of its last event. age_s: since then. vector: float32, as numbers and as base64 of their
    bytes, little endian. predictions: by task, or `task.class`; a task without a head is not there.
    """

    client_id: str
    events_seen: int
    timestamp_ms: int
    age_s: float
    offset: int
    parameter_version: int
    vector: list[float]
    vector_base64: str
    predictions: dict[str, float]


class Clients:
    """Reads rows of the partitions in `owned`, by number.

    Parameters
    ----------
    wall_clock: seconds since 1970, for ages.
    """

    def __init__(
        self, owned: Mapping[int, OwnedPartition], settings: Settings, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._owned = owned
        self._partitions = settings.topics.partitions
        self._longest = settings.limits.client_id_bytes
        self._wall_clock = wall_clock
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="query")
        #: By partition: small questions that wait for the ones in hand, and who answers them.
        self._waiting: dict[int, list[tuple[list[str], asyncio.Future[dict[str, bytes | None]]]]] = {}
        self._answering: dict[int, asyncio.Task[None]] = {}

    def partition_of(self, client_id: str) -> int:
        """The partition that a client's events are in."""
        return partition_of(client_id.encode(), self._partitions)

    async def read(self, client_ids: Sequence[str]) -> dict[str, bytes | None]:
        """`ClientView` of each client as JSON, None for those without a row; clients of others are left out."""
        by_partition: dict[int, list[str]] = {}
        for client_id in client_ids:
            by_partition.setdefault(self.partition_of(client_id), []).append(client_id)
        found: dict[str, bytes | None] = {}
        for views in await asyncio.gather(*(self._read(number, ids) for number, ids in by_partition.items())):
            found.update(views)
        return found

    def close(self) -> None:
        """Read no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _read(self, number: int, ids: list[str]) -> dict[str, bytes | None]:
        if number not in self._owned:
            return {}
        if len(ids) > _SMALL:
            return await self._look_up(number, ids)
        answer: asyncio.Future[dict[str, bytes | None]] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(number, []).append((ids, answer))
        if number not in self._answering:
            self._answering[number] = asyncio.create_task(self._answer(number))
        return await answer

    async def _answer(self, number: int) -> None:
        """Answer what waits, until nothing does."""
        together: list[tuple[list[str], asyncio.Future[dict[str, bytes | None]]]] = []
        try:
            while together := self._waiting.pop(number, []):
                asked = list(dict.fromkeys(client_id for ids, _ in together for client_id in ids))
                try:
                    views = await self._look_up(number, asked)
                except Exception as error:
                    for _, answer in together:
                        if not answer.done():
                            answer.set_exception(error)
                    continue
                for ids, answer in together:
                    if not answer.done():
                        answer.set_result({client_id: views[client_id] for client_id in ids if client_id in views})
        finally:
            # Nobody may wait for ever where this is cancelled.
            for _, answer in together + self._waiting.pop(number, []):
                answer.cancel()
            del self._answering[number]

    async def _look_up(self, number: int, ids: list[str]) -> dict[str, bytes | None]:
        owned = self._owned.get(number)
        if owned is None:
            return {}
        # Taken together here, where neither can be replaced in between.
        partition, served = owned.partition, owned.served
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._views, partition, served, ids)
        except StoreError:
            if self._owned.get(number) is owned and owned.partition is partition:
                raise
            # Let go of meanwhile; whoever has it now answers.
            return {}

    def _views(self, partition: Partition, served: Served, ids: list[str]) -> dict[str, bytes | None]:
        views: dict[str, bytes | None] = {}
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            views.update(self._chunk(partition, served, chunk))
        return views

    def _chunk(self, partition: Partition, served: Served, ids: list[str]) -> dict[str, bytes | None]:
        views: dict[str, bytes | None] = dict.fromkeys(ids)
        # No event is accepted of a longer one.
        ids = [client_id for client_id in ids if len(client_id.encode()) <= self._longest]
        found = partition.store.lookup(PackedKeys.from_list([client_id.encode() for client_id in ids]))
        known = np.flatnonzero(found.found)
        if not len(known):
            return views
        rows = found.take(known)
        vectors = served.vectors(rows.vectors, rows.last_event_ms).astype("<f4")
        predictions = _predictions(served, rows)
        now_s = self._wall_clock()
        for i, at in enumerate(known.tolist()):
            view = ClientView(
                client_id=ids[at],
                events_seen=int(rows.events_seen[i]),
                timestamp_ms=int(rows.last_event_ms[i]),
                age_s=round(max(0.0, now_s - int(rows.last_event_ms[i]) / 1000.0), 3),
                offset=int(rows.applied_offset[i]),
                parameter_version=served.version,
                vector=vectors[i].tolist(),
                vector_base64=base64.b64encode(vectors[i].tobytes()).decode(),
                predictions={task: float(values[i]) for task, values in predictions.items()},
            )
            views[ids[at]] = msgspec.json.encode(view)
        return views


def _predictions(served: Served, rows: Lookup) -> dict[str, NDArray[np.float32]]:
    hidden = served.engine.layout.hidden
    features = served.questions.readout.features(rows.vectors[:, :hidden], rows.vectors[:, hidden:], rows.last_event_ms)
    found: dict[str, NDArray[np.float32]] = {}
    for task, head in served.heads.items():
        names = served.questions.by_task[task].outputs
        found.update(zip(names, head.predict_typical(features).T, strict=True))
    return found
