"""Batches between two threads: order, one under way, repeated as they were, bounded."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.batch_queue import BatchQueue, QueuedBatch
from stream.errors import BrokerError
from stream.store import PackedKeys
from stream.wire import PackedValues


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def new_queue(batch_bytes: int = 2_000, unconfirmed_bytes: int = 1 << 30, clock: Any = None) -> BatchQueue:
    clock = clock or Clock()
    return BatchQueue("records", batch_bytes, unconfirmed_bytes, clock, clock)


def put(queue: BatchQueue, partition: int, first: int, n: int) -> None:
    numbers = [b"%d" % i for i in range(first, first + n)]
    queue.put(partition, PackedKeys.from_list([b"k"] * n), PackedValues.from_list(numbers))


def numbers(batch: QueuedBatch) -> list[int]:
    parsed = MemoryRecords(batch.sealed("none", 9, 0)).next_batch()
    assert parsed is not None
    assert parsed.base_sequence == batch.sequence
    return [int(record.value) for record in parsed]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 2), st.integers(0, 120)),
        st.tuples(st.sampled_from(["take", "confirm", "back"]), st.integers(0, 2), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(100, 3000))
def test_each_partition_comes_out_in_order_one_batch_at_a_time(drawn: list[tuple[str, int, int]], limit: int) -> None:
    # Given puts, batches taken, confirmed and given back, in any order
    queue = new_queue(limit)
    given_in, confirmed = [0, 0, 0], [0, 0, 0]
    under_way: dict[int, QueuedBatch] = {}
    returned: dict[int, bytes] = {}

    def take(partition: int) -> None:
        assert partition not in under_way
        batch = under_way[partition] = queue.take(partition)
        # Then a batch given back comes first, the same bytes
        sealed = batch.sealed("none", 9, 0)
        assert returned.pop(partition, sealed) == sealed
        # Then it begins where the last confirmed one ended, by sequence too
        assert numbers(batch)[0] == batch.sequence == confirmed[partition]

    def confirm(partition: int) -> None:
        batch = under_way.pop(partition)
        confirmed[partition] += len(numbers(batch))
        queue.confirm(batch)

    for what, partition, n in drawn:
        if what == "put":
            put(queue, partition, given_in[partition], n)
            given_in[partition] += n
        elif what == "take" and partition in queue.ready():
            take(partition)
        elif what == "confirm" and partition in under_way:
            confirm(partition)
        elif what == "back" and partition in under_way:
            batch = under_way.pop(partition)
            returned[partition] = batch.sealed("none", 9, 0)
            queue.give_back(batch)
    for partition in list(under_way):
        confirm(partition)
    while queue.ready():
        partition = queue.ready()[0]
        take(partition)
        confirm(partition)
    # And all of it came out
    assert confirmed == given_in
    assert queue.unconfirmed_bytes == 0
    queue.wait_confirmed(0.0)


def test_batches_that_wait_go_on_growing_until_they_are_full() -> None:
    queue = new_queue(batch_bytes=600)
    for i in range(30):
        put(queue, 0, 10 + i, 1)
    batch = queue.take(0)
    assert len(numbers(batch)) > 20
    # A batch that was taken grows no more
    put(queue, 0, 40, 1)
    assert 40 not in numbers(batch)


def test_sequence_numbers_begin_again_after_the_largest() -> None:
    queue = new_queue()
    put(queue, 0, 0, 3)
    first = queue.take(0)
    queue.confirm(first)
    queue._lanes[0].next_sequence = 0x7FFFFFFF
    put(queue, 0, 3, 2)
    second = queue.take(0)
    assert second.sequence == 0x7FFFFFFF
    queue.confirm(second)
    put(queue, 0, 5, 1)
    assert queue.take(0).sequence == 1


def test_put_waits_until_enough_is_confirmed() -> None:
    # Given a queue that is full
    queue = new_queue(batch_bytes=500, unconfirmed_bytes=800)
    put(queue, 0, 0, 100)
    entered, done = threading.Event(), threading.Event()

    def go_on() -> None:
        entered.set()
        put(queue, 0, 100, 1)
        done.set()

    thread = threading.Thread(target=go_on)
    thread.start()
    assert entered.wait(10)
    # When batches are confirmed one by one
    while not done.is_set() and queue.ready():
        assert queue.unconfirmed_bytes >= 800 or done.wait(10)
        if not done.is_set():
            queue.confirm(queue.take(0))
    # Then the call ends as soon as there is room
    assert done.wait(10)
    thread.join()
    assert queue.ready() == [0]


def test_a_failure_wakes_everyone_and_stays() -> None:
    queue = new_queue(unconfirmed_bytes=1)
    put(queue, 0, 0, 1)
    taken = queue.take(0)
    raised: list[BaseException] = []

    def wait(call: Any) -> None:
        try:
            call()
        except BrokerError as error:
            raised.append(error)

    threads = [
        threading.Thread(target=wait, args=(lambda: put(queue, 0, 1, 1),)),
        threading.Thread(target=wait, args=(lambda: queue.wait_confirmed(1e6),)),
    ]
    for thread in threads:
        thread.start()
    queue.fail(BrokerError("first"))
    queue.fail(BrokerError("second"))
    for thread in threads:
        thread.join(10)
    assert [str(error) for error in raised] == ["first", "first"]
    # What is settled afterwards changes nothing
    queue.confirm(taken)
    queue.give_back(taken)
    assert queue.ready() == []
    with pytest.raises(BrokerError, match="first"):
        queue.wait_confirmed(0.0)


def test_the_age_is_that_of_the_oldest_batch() -> None:
    clock = Clock()
    queue = new_queue(clock=clock)
    assert queue.oldest_s() == 0.0
    put(queue, 0, 0, 1)
    clock.now += 5.0
    put(queue, 1, 0, 1)
    assert queue.oldest_s() == 5.0
    queue.confirm(queue.take(0))
    assert queue.oldest_s() == 0.0
