"""A checkpoint that is cut short, or whose partition is given up meanwhile, leaves all as the next one needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stream.broker import Broker
from stream.changelog import ChangelogWriter
from stream.checkpoint import Pace
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


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def never() -> bool:
    return False


def work(pace: Pace, clock: Clock, slices: int, slice_s: float, pause_s: float) -> tuple[float, int]:
    """(seconds, pauses) of slices that take `slice_s`, where a pause takes at least `pause_s`."""
    began, pauses = clock.now, 0
    for _ in range(slices):
        clock.now += slice_s
        pause = pace.next()
        if pause is not None:
            pauses += 1
            clock.now += max(pause, pause_s)
            pace.go_on()
    return clock.now - began, pauses


def test_work_that_has_time_is_spread_over_it_slice_by_slice() -> None:
    clock = Clock()
    took, pauses = work(Pace(0.020, never, clock), clock, 50, slice_s=0.001, pause_s=0.0)
    assert took == pytest.approx(50 * 0.020)
    assert pauses == 50


def test_work_beside_large_blocks_does_not_stretch() -> None:
    # Given pauses that take three times as long as a slice has
    clock = Clock()
    took, pauses = work(Pace(0.010, never, clock), clock, 100, slice_s=0.001, pause_s=0.030)
    # Then slices come together in between, and the work is done in its time
    assert took < 100 * 0.010 + 0.030
    assert pauses < 40


def test_work_without_time_lets_others_go_now_and_then() -> None:
    clock = Clock()
    took, pauses = work(Pace(0.0, never, clock), clock, 100, slice_s=0.001, pause_s=0.010)
    assert 20 <= pauses <= 25
    assert took == pytest.approx(0.1 + pauses * 0.010)


def test_a_checkpoint_that_somebody_waits_for_is_spread_no_longer(
    owned: OwnedPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a checkpoint of many slices, spread over ten seconds
    monkeypatch.setattr("stream.checkpoint._SLICE_ROWS", 1)
    monkeypatch.setattr("stream.checkpoint._LONGEST_SLICE_S", 10.0)
    assert owned.partition.store.stats.unsaved_rows >= 20

    async def run() -> float:
        loop = asyncio.get_running_loop()
        spread = asyncio.create_task(owned.checkpoint(commit, 30.0, 10.0))
        await asyncio.sleep(0)
        began = loop.time()
        # When the partition is to be let go of
        await owned.checkpoint(commit, 30.0)
        assert spread.done()
        return loop.time() - began

    # Then both have ended long before
    assert asyncio.run(run()) < 5.0
