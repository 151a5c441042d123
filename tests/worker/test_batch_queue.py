"""Batches between two threads: order, one under way, repeated as they were, bounded."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.batch_queue import BatchQueue, QueuedBatch
from stream.errors import BrokerError, Fenced
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
    queue = BatchQueue("records", batch_bytes, unconfirmed_bytes, clock, clock)
    for partition in range(3):
        begin(queue, partition)
    return queue


def begin(queue: BatchQueue, partition: int, epoch: int = 0) -> None:
    """Begin a partition whose identity is granted at once."""

    def grant() -> None:
        for lane in queue.take_unidentified(1e9):
            queue.identify(lane, 9, epoch)

    queue.begin(partition, 0.0, grant)


def put(queue: BatchQueue, partition: int, first: int, n: int) -> None:
    numbers = [b"%d" % i for i in range(first, first + n)]
    queue.put(partition, PackedKeys.from_list([b"k"] * n), PackedValues.from_list(numbers))


def ready(queue: BatchQueue) -> list[int]:
    return [lane.partition for lane in queue.ready()]


def take(queue: BatchQueue, partition: int) -> QueuedBatch:
    """The next batch of a partition that is ready."""
    (lane,) = (one for one in queue.ready() if one.partition == partition)
    batch = queue.take(lane)
    assert batch is not None
    return batch


def numbers(batch: QueuedBatch) -> list[int]:
    parsed = MemoryRecords(batch.sealed("none")).next_batch()
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

    def take_next(partition: int) -> None:
        assert partition not in under_way
        batch = under_way[partition] = take(queue, partition)
        # Then a batch given back comes first, the same bytes
        sealed = batch.sealed("none")
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
        elif what == "take" and partition in ready(queue):
            take_next(partition)
        elif what == "confirm" and partition in under_way:
            confirm(partition)
        elif what == "back" and partition in under_way:
            batch = under_way.pop(partition)
            returned[partition] = batch.sealed("none")
            queue.give_back(batch)
    for partition in list(under_way):
        confirm(partition)
    while queue.ready():
        partition = ready(queue)[0]
        take_next(partition)
        confirm(partition)
    # And all of it came out
    assert confirmed == given_in
    assert queue.unconfirmed_bytes == 0
    queue.wait_confirmed(0.0)


def test_batches_that_wait_go_on_growing_until_they_are_full() -> None:
    queue = new_queue(batch_bytes=600)
    for i in range(30):
        put(queue, 0, 10 + i, 1)
    batch = take(queue, 0)
    assert len(numbers(batch)) > 20
    # A batch that was taken grows no more
    put(queue, 0, 40, 1)
    assert 40 not in numbers(batch)


def test_sequence_numbers_begin_again_after_the_largest() -> None:
    queue = new_queue()
    put(queue, 0, 0, 3)
    first = take(queue, 0)
    queue.confirm(first)
    queue._lanes[0].next_sequence = 0x7FFFFFFF
    put(queue, 0, 3, 2)
    second = take(queue, 0)
    assert second.sequence == 0x7FFFFFFF
    queue.confirm(second)
    put(queue, 0, 5, 1)
    assert take(queue, 0).sequence == 1


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
            queue.confirm(take(queue, 0))
    # Then the call ends as soon as there is room
    assert done.wait(10)
    thread.join()
    assert ready(queue) == [0]


def test_a_failure_wakes_everyone_and_stays() -> None:
    queue = new_queue(unconfirmed_bytes=1)
    put(queue, 0, 0, 1)
    taken = take(queue, 0)
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
    queue.confirm(take(queue, 0))
    assert queue.oldest_s() == 0.0


def test_a_partition_that_was_given_up_begins_anew() -> None:
    # Given a batch under way and another that waits
    queue = new_queue(unconfirmed_bytes=300)
    put(queue, 0, 0, 1)
    taken = take(queue, 0)
    put(queue, 0, 1, 1)
    put(queue, 1, 0, 1)
    # When the partition is given up, and then put to again
    queue.give_up(0)
    with pytest.raises(BrokerError, match="partition 0 is not written from here"):
        put(queue, 0, 5, 1)
    begin(queue, 0)
    put(queue, 0, 7, 1)
    # Then only what came later is left, whatever becomes of the batch under way
    queue.give_back(taken)
    first = take(queue, 0)
    assert numbers(first) == [7]
    assert first.sequence == 0
    queue.confirm(taken)
    assert queue.ready() != []
    queue.confirm(first)
    queue.confirm(take(queue, 1))
    assert queue.unconfirmed_bytes == 0
    queue.wait_confirmed(0.0)


def test_whoever_waits_for_a_partition_is_told_that_it_is_given_up() -> None:
    queue = new_queue()
    put(queue, 0, 0, 1)
    put(queue, 1, 0, 1)
    raised: list[BrokerError] = []
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        try:
            queue.wait_confirmed(1e6, 0)
        except BrokerError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert entered.wait(10)
    # A later writer of the partition changes nothing for who waited for the earlier one
    while not raised:
        begin(queue, 0)
        put(queue, 0, 1, 1)
        thread.join(0.01)
    assert "partition 0 was given up" in str(raised[0])


def test_a_fenced_partition_takes_nothing_and_says_so() -> None:
    # Given two partitions, of which one is fenced with a batch under way
    queue = new_queue()
    for partition in (0, 1):
        put(queue, partition, 0, 1)
    taken = take(queue, 0)
    queue.fence(taken.lane)
    # When more is put in
    put(queue, 0, 1, 1)
    # Then it is dropped, and waiting for it raises, for the other partition not
    assert ready(queue) == [1]
    with pytest.raises(Fenced, match="another worker writes partition 0 now"):
        queue.wait_confirmed(0.0, 0)
    with pytest.raises(Fenced):
        queue.wait_confirmed(0.0)
    queue.confirm(take(queue, 1))
    queue.wait_confirmed(0.0, 1)
    assert queue.unconfirmed_bytes == 0


def test_an_old_identity_is_asked_for_again_while_nothing_waits() -> None:
    # Given lanes that were identified a while ago, and one with a batch
    clock = Clock()
    queue = new_queue(clock=clock)
    put(queue, 0, 0, 2)
    clock.now += 100.0
    # When old ones are looked for, then it keeps the identity it has, given out or not
    assert queue.take_unidentified(200.0) == []
    assert [lane.partition for lane in queue.take_unidentified(50.0)] == [1, 2]
    first = take(queue, 0)
    assert queue.take_unidentified(50.0) == []
    queue.give_back(first)
    assert queue.take_unidentified(50.0) == []
    queue.confirm(take(queue, 0))
    # And is asked for again once it is idle, from sequence 0 on
    (lane,) = queue.take_unidentified(50.0)
    put(queue, 0, 2, 1)
    assert queue.ready() == []
    queue.identify(lane, 9, 1)
    second = take(queue, 0)
    assert (second.sequence, lane.producer) == (0, (9, 1))


def test_begin_gives_up_waiting_for_an_identity() -> None:
    queue = new_queue()
    with pytest.raises(BrokerError, match="no producer id for partition 7 within 0 s"):
        queue.begin(7, 0.0, lambda: None)
    # And a later attempt is not in the way of an earlier one
    begin(queue, 7)
    put(queue, 7, 0, 1)
    assert numbers(take(queue, 7)) == [0]
