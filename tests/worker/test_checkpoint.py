"""A checkpoint that is cut short, or whose partition is given up meanwhile, leaves all as the next one needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stream.broker import Broker
from stream.changelog import ChangelogWriter
from stream.errors import BrokerError
from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.outputs import Outputs
from stream.owned import OwnedPartition
from stream.partition import Partition, Served, Serving
from stream.store import EmbeddingStore, StoreOptions
from stream.transport import FetchedBlock
from stream.wire import EmbeddingEncoder, EventDecoder
from tests.support.truth import block_of, changelog_states, read_topic, store_states
from tests.worker.conftest import System


@pytest.fixture
def system(embedded_broker: Broker, tmp_path: Path) -> System:
    system = System(embedded_broker, tmp_path)
    system.publish(400)
    return system


@pytest.fixture
def owned(system: System) -> Iterator[OwnedPartition]:
    """A partition whose events are applied, with nothing of it in the changelog yet."""
    settings, layout = system.settings, system.layout
    questions = Questions(layout)
    served = Served(Engine(layout, system.parameters), questions, {}, 1)
    store = EmbeddingStore.open(system.directory / "rows", StoreOptions(width=layout.width))
    decoder = EventDecoder(layout.schema, settings.limits, "msgpack")
    partition = Partition(0, store, 0, decoder, EmbeddingEncoder(layout.hidden, ["accepted"]))
    partition.apply(FetchedBlock(0, 0, block_of(read_topic(settings, settings.topics.events, 0))), served)
    outputs, executor = Outputs(settings), ThreadPoolExecutor(2)
    outputs.begin(0)
    owned = OwnedPartition(
        settings, layout.fingerprint, partition, ChangelogWriter(settings, 0), Serving(served), outputs, executor, False
    )
    yield owned
    owned.close()
    outputs.close()
    executor.shutdown()


async def commit(position: int) -> bool:
    return True


def test_a_checkpoint_that_is_cut_short_at_any_moment_leaves_the_next_one_whole(
    system: System, owned: OwnedPartition
) -> None:
    async def cut_short(after_s: float) -> bool:
        task = asyncio.create_task(owned.checkpoint(commit, 30.0))
        _, running = await asyncio.wait([task], timeout=after_s)
        task.cancel()
        await asyncio.wait([task])
        return bool(running)

    async def run() -> None:
        # Given checkpoints that are cut short, each a little later than the one before, until one is faster
        after_s = 0.0
        while await cut_short(after_s):
            after_s += 0.0005
        # When the last one is not
        await owned.checkpoint(commit, 30.0)

    asyncio.run(run())
    # Then rows and position are in the changelog
    states, position = changelog_states(system.settings, system.layout, 0)
    assert position == owned.partition.position
    assert states == store_states(owned.partition.store)


def test_a_partition_that_is_given_up_during_a_checkpoint_is_closed_when_that_has_ended(
    system: System, owned: OwnedPartition
) -> None:
    async def run() -> None:
        # Given a checkpoint that is being written
        task = asyncio.create_task(owned.checkpoint(commit, 30.0))
        await asyncio.sleep(0)
        # When its partition is given up
        owned.close()
        # Then it is still open for the checkpoint
        assert not owned.closed.is_set()
        assert not task.done()
        await task
        # And closed after it
        assert owned.closed.is_set()

    asyncio.run(run())
    states, position = changelog_states(system.settings, system.layout, 0)
    assert len(states) > 0
    assert position == owned.partition.position
    # And no other checkpoint begins
    with pytest.raises(BrokerError, match="given up"):
        asyncio.run(owned.checkpoint(commit, 30.0))
