"""Windows of a trunk that learns online: the same however input is cut, gone with their rows, true to their states."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from stream.errors import SettingsError, StoreError
from stream.partitioner import partition_of
from stream.settings import Settings
from trainer.online import OnlineTrainer
from trainer.timeline import Record

from . import shop
from .shop import DAY_MS, START_MS, open_trainer, purchase, records
from .test_online import after_crashes, feed, merged, year

ONLINE = {
    "MODEL__TRUNK": "online",
    "MODEL__ONLINE__LENGTH": "3",
    "MODEL__ONLINE__BURN_IN": "1",
    "MODEL__ONLINE__LABELS": "5",
    "STORE__MEMORY_ROWS": "64",
}
Stream = list[tuple[int, Record]]


def online(**more: str) -> Settings:
    return shop.settings(**(ONLINE | more))


def where_they_belong(found: list[Record]) -> list[Record]:
    """Records in the partitions of their clients, as publishers send them."""
    ends = [0, 0]
    out = []
    for one in sorted(found, key=lambda record: record.timestamp_ms):
        partition = partition_of(one.key or b"", 2)
        out.append(Record(partition, ends[partition], one.timestamp_ms, one.key, one.value, ()))
        ends[partition] += 1
    return out


def everything(trainer: OnlineTrainer) -> dict[str, str]:
    """Digests of what is on disk, by kind: heads, rows, windows, the trunk with its optimiser and labels that wait."""
    trainer.checkpoint(0)
    found = {}
    for kind, prefixes in {"heads": (b"t/",), "rows": (b"r",), "windows": (b"w",), "trunk": (b"k/", b"p/")}.items():
        digest = hashlib.blake2b()
        for prefix in prefixes:
            for key, value in trainer.database.scan(prefix):
                digest.update(key + value)
        found[kind] = digest.hexdigest()
    return found


@pytest.fixture(scope="module")
def stream() -> Stream:
    # More clients than rows in memory, with more events than windows hold.
    events, feedback = year(90)
    return merged(where_they_belong(events), where_they_belong(feedback))


class Pieces:
    """A stream to be cut; short where it is written out."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream


@pytest.fixture(scope="module")
def pieces(stream: Stream) -> Pieces:
    return Pieces(stream)


@pytest.fixture(scope="module")
def undisturbed(stream: Stream, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one pass leads to, one record at a time."""
    trainer = open_trainer(tmp_path_factory.mktemp("undisturbed"), online())
    before = trainer.parameters["trunk/weight_hh"]
    for one in stream:
        feed(trainer, [one])
        if trainer.needs_checkpoint:
            trainer.checkpoint(0)
    assert trainer.trunk is not None
    assert trainer.trunk.steps > 5
    assert not np.array_equal(trainer.parameters["trunk/weight_hh"], before)
    result = everything(trainer)
    trainer.close()
    return result


@budget(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cuts=st.lists(st.integers(0, 455), max_size=6), crashes=st.sets(st.integers(0, 6)))
def test_crashes_and_cuts_change_neither_windows_nor_trunk(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: Pieces,
    undisturbed: dict[str, str],
    cuts: list[int],
    crashes: set[int],
) -> None:
    # Given a trainer that takes the stream in pieces, and loses what came after its last checkpoint at some
    trainer = after_crashes(tmp_path_factory.mktemp("crashing"), online(), pieces.stream, cuts, crashes)
    # Then rows, windows, trunk and optimiser are those of one pass, bit for bit
    assert everything(trainer) == undisturbed
    trainer.close()


def test_a_window_leads_from_its_state_to_its_row(tmp_path: Path, stream: Stream) -> None:
    # Given a trunk that no label has moved, and clients of whom some did more than a window holds
    trainer = open_trainer(tmp_path, online(MODEL__ONLINE__LABELS="4096", STORE__MEMORY_ROWS="1000"))
    feed(trainer, stream)
    assert trainer.trunk is not None
    clients = sorted({one.key or b"" for kind, one in stream if kind == 0})
    slots = trainer.replica.look(clients, [partition_of(client, 2) for client in clients], trainer.joiner.watermarks)
    windows = trainer.trunk.windows.sequences(slots)
    assert not windows.whole.all()
    assert windows.whole.any()
    for i, slot in enumerate(slots.tolist()):
        # When its events are replayed from the state before them
        length = int(windows.length[i])
        dense, codes = windows.dense[i, :length], windows.codes[i, :length]
        states = trainer.engine.step(dense, codes, np.arange(length + 1), windows.first[i : i + 1])
        # Then the row's state comes out, bit for bit; before a whole history nothing was
        assert states[-1].tobytes() == trainer.replica.vectors[slot, :8].tobytes()
        assert windows.first[i].any() == (not windows.whole[i])
    trainer.close()


def test_windows_expire_with_their_rows(tmp_path: Path) -> None:
    # Given rows that live for a day
    trainer = open_trainer(tmp_path, online(STORE__TTL_S="86400"))
    assert trainer.trunk is not None

    def window(client: str) -> tuple[int, bool]:
        slot = trainer.replica.look([client.encode()], [0], trainer.joiner.watermarks)
        assert slot[0] >= 0
        found = trainer.trunk.windows.sequences(slot)
        return int(found.length[0]), bool(found.whole[0])

    old = [("a", purchase("a", START_MS + i)) for i in range(5)] + [("b", purchase("b", START_MS))]
    trainer.apply_events(records(old))
    assert window("a") == (3, False)
    # When a day has passed and one of two clients returns
    trainer.apply_events(records([("c", purchase("c", START_MS + DAY_MS + 10))], first=6))
    assert trainer.replica.look([b"b", b"nobody"], [0, 0], trainer.joiner.watermarks).tolist() == [-1, -1]
    trainer.apply_events(records([("a", purchase("a", START_MS + DAY_MS + 11))], first=7))
    # Then it begins anew, and of the other nothing is left on disk either
    assert window("a") == (1, True)
    trainer.checkpoint(0)
    trainer.close()
    trainer = open_trainer(tmp_path, online(STORE__TTL_S="86400"))
    for _ in range(2):
        trainer.checkpoint(0)
    kept = {prefix: [key[5:] for key, _ in trainer.database.scan(prefix)] for prefix in (b"r", b"w")}
    assert kept == {b"r": [b"a", b"c"], b"w": [b"a", b"c"]}
    trainer.close()


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"model\.online\.burn_in = 3: expected less than model.online.length = 3"):
        online(MODEL__ONLINE__BURN_IN="3")
    with pytest.raises(SettingsError, match=r"model\.trunk = 'online': expected 'fixed', or a task whose head is mlp"):
        online(TASKS__REDEEMED__STATE_PRIOR_VARIANCE="0")
    trainer = open_trainer(tmp_path, online())
    trainer.apply_events(records([("a", purchase("a", START_MS + i)) for i in range(5)]))
    trainer.checkpoint(0)
    trainer.close()
    # A trunk of the other kind has other states, a window of another length other bytes
    with pytest.raises(StoreError, match=r"made with model\.trunk = 'online', which is 'fixed' now"):
        open_trainer(tmp_path, shop.settings())
    trainer = open_trainer(tmp_path, online(MODEL__ONLINE__LENGTH="2"))
    with pytest.raises(StoreError, match=r"restore model\.online\.length"):
        trainer.apply_events(records([("a", purchase("a", START_MS + 9))], first=5))
    trainer.close()
