"""The guard on a real broker: what workers are served while labels are wrong for a while, through a SIGKILL."""

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess

from stream.model.parameters import ParameterSet
from tests.support.processes import http_get, metric, wait_for
from trainer.pretrain import random_trunk, save_parameters

from .conftest import LiveShop, NewShop
from .shop import open_trainer
from .spoilt import OPTIONS, PIECE, RIGHT, SPOILT, WRONG, give, returns, spoilt
from .test_parameter_faults import reading

HEAD = "head/redeemed/weight"


def head(bits: dict[str, bytes]) -> bytes:
    return bits.get(HEAD, b"")


@contextmanager
def trainer_process(live: LiveShop, port: int) -> Iterator[ForkServerProcess]:
    """A trainer; killed at the end."""
    process = live.forked("--trunk", str(live.directory / "trunk.msgpack"))
    yield process
    assert process.is_alive(), live.log()
    process.kill()
    process.join()


def test_workers_keep_the_good_head_while_labels_are_wrong_for_a_while(new_shop: NewShop, free_port: int) -> None:
    live = new_shop(
        toml=SPOILT, TRAINER__HTTP_PORT=str(free_port), **OPTIONS
    )  # fmt: skip
    save_parameters(live.directory / "trunk.msgpack", random_trunk(live.settings, []))
    # Given what a trainer makes of it that nobody disturbs: right labels, wrong ones, and right ones again until it
    # holds back, until it has gone back, and some more
    calm = open_trainer(live.directory / "calm", live.settings)
    give(calm, 0, RIGHT)
    heads = [calm.tensors()[HEAD].tobytes()]
    calm.serve(ParameterSet(calm.tensors(), 1))
    give(calm, RIGHT, WRONG, wrong=True)
    sent = RIGHT + WRONG
    until = [RIGHT]
    for done in (lambda: calm.guards.held == {"redeemed"}, lambda: returns(calm) == 1):
        while not done():
            give(calm, sent, PIECE)
            sent += PIECE
        until.append(sent)
        heads.append(calm.tensors()[HEAD].tobytes())
    give(calm, sent, 4 * PIECE)
    until.append(sent + 4 * PIECE)
    heads.append(calm.tensors()[HEAD].tobytes())
    calm.close()

    def publish(first: int, count: int, wrong: bool = False) -> None:
        events, feedback = spoilt(first, count, wrong)
        live.publish(live.settings.topics.events, events)
        live.publish(live.settings.topics.feedback, feedback)

    def guard(name: str) -> float:
        return metric(free_port, f"livestate_trainer_guard_{name}")

    with reading(live.settings) as worker:
        # And a trainer that has published what the right ones taught it
        publish(0, RIGHT)
        with trainer_process(live, free_port):
            wait_for(lambda: bool(worker.served) and head(worker.served[-1][1]) == heads[0], 60, "the good head")
            wait_for(lambda: "livestate_trainer_guard_holding{" in http_get(free_port, "/metrics")[1], 60, "gauges")
            assert guard("holding") == guard("returns_total") == 0
        good = len(worker.served)
        # When wrong ones come, and so many right ones that it holds back what it has learned
        publish(RIGHT, WRONG, wrong=True)
        publish(RIGHT + WRONG, until[1] - RIGHT - WRONG)
        with trainer_process(live, free_port):
            wait_for(lambda: guard("holding") == 1, 60, "it holds back")
            wait_for(lambda: guard("held_back_versions_total") == 1, 60, "a version without it is counted")
            # Then what it publishes still has the good head
            wait_for(lambda: metric(free_port, "livestate_parameter_version") > worker.served[good - 1][0], 60, "more")
            worker.wait(int(metric(free_port, "livestate_parameter_version")))
            assert "'redeemed': versions are held back: over the last" in live.log()
        assert {head(bits) for _, bits in worker.served[good:]} == {heads[0]}
        # When it is killed there, and more right ones prove it
        good = len(worker.served)
        publish(until[1], until[2] - until[1])
        with trainer_process(live, free_port):
            # Then it goes back to the good state and publishes that, bit for bit as if it had not been killed
            wait_for(lambda: head(worker.served[-1][1]) == heads[2], 60, "the head it went back to")
            wait_for(lambda: guard("returns_total") == 1 and guard("holding") == 0, 60, "the gauges say so")
            assert {head(bits) for _, bits in worker.served[good:]} <= {heads[0], heads[2]}
            # And it learns and publishes on
            publish(until[2], until[3] - until[2])
            wait_for(lambda: head(worker.served[-1][1]) == heads[3], 60, "what it learned since")
            assert guard("returns_total") == 1
