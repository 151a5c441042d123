"""Disks that are full, read-only, damaged or shared: the store stops and says what to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stream.errors import StoreError
from stream.store import (
    EmbeddingStore,
    PackedKeys,
    StoreCorrupt,
    StoreLocked,
    StoreOptions,
)
from tests.store.conftest import Opener

OPTIONS = StoreOptions(width=64, memory_rows=10)
ROWS = 150_000
KEYS = PackedKeys.from_int64(np.arange(ROWS))


@pytest.fixture(scope="module")
def whole_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table as a kill leaves it: rows in SST files, and the last commits only in the log."""
    root = tmp_path_factory.mktemp("whole")
    with EmbeddingStore.open(root / "live", OPTIONS) as store:
        for start in range(0, ROWS, 10_000):
            store.upsert(KEYS.take(np.arange(start, start + 10_000)), np.ones((10_000, 64)), event_ms=1)
            store.flush()
        # Once nothing is being compacted, every file there is one of the table's.
        while {path.name for path in (root / "live").glob("*.sst")} != live_files(store):
            pass
        shutil.copytree(root / "live", root / "table")
    return root / "table"


def live_files(store: EmbeddingStore) -> set[str]:
    disk = store._core.disk
    assert disk is not None
    return {Path(file["name"]).name for file in disk._db.live_files()}


@pytest.fixture
def table(whole_table: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole_table, tmp_path / "table"))


def largest(table: Path, pattern: str) -> Path:
    return max(table.glob(pattern), key=lambda path: path.stat().st_size)


def spoil(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + 64] = bytes(64)
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a corrupt sst": lambda table: spoil(largest(table, "*.sst"), 10_000),
    "a cut sst": lambda table: os.truncate(largest(table, "*.sst"), 1000),
    "a missing sst": lambda table: largest(table, "*.sst").unlink(),
    "a missing log": lambda table: largest(table, "*.log").unlink(),
    "a cut log": lambda table: os.truncate(largest(table, "*.log"), 1000),
    "a corrupt log": lambda table: spoil(largest(table, "*.log"), 10_000),
    "a missing manifest": lambda table: largest(table, "MANIFEST-*").unlink(),
    "a corrupt manifest": lambda table: spoil(largest(table, "MANIFEST-*"), 100),
    "a missing CURRENT": lambda table: (table / "CURRENT").unlink(),
    "a missing marker": lambda table: (table / "table.json").unlink(),
    "an empty marker": lambda table: (table / "table.json").write_text(""),
    "nothing left but the marker": lambda table: [
        path.unlink() for path in table.iterdir() if path.name not in ("table.json", "owner.lock")
    ],
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda name: name.replace(" ", "_"))
def test_given_damage_then_the_store_stops_with_path_and_advice_and_never_starts_empty(
    table: Path, damage: str
) -> None:
    DAMAGE[damage](table)

    with pytest.raises(StoreCorrupt) as caught, EmbeddingStore.open(table, OPTIONS) as store:
        store.lookup(KEYS)

    assert str(table) in str(caught.value)
    assert "restored from the changelog" in str(caught.value)


def test_given_a_start_that_was_cut_off_before_the_first_commit_then_it_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "table"
    EmbeddingStore.open(path, OPTIONS).close()
    (path / "table.json").write_text('{"format": 1, "width": 64, "state_width": 0, "state": "new"}')
    (path / "CURRENT").unlink()
    with EmbeddingStore.open(path, OPTIONS) as store:
        store.upsert([b"a"], np.ones((1, 64)), event_ms=1)
        assert store.flush() == 1


def test_given_a_directory_of_something_else_then_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(StoreCorrupt, match=r"holds 'holiday\.jpg' but no table\.json"):
        EmbeddingStore.open(tmp_path, OPTIONS)


def test_given_another_width_then_the_table_is_refused(table: Path) -> None:
    with pytest.raises(StoreError, match="use the widths it was written with"):
        EmbeddingStore.open(table, StoreOptions(width=32, memory_rows=10))


def test_given_memory_rows_without_a_path_then_it_is_refused(open_store: Opener) -> None:
    with pytest.raises(StoreError, match=r"store\.memory_rows"):
        open_store(None, memory_rows=10)


HOLDER = """
import sys
from stream.store import EmbeddingStore, StoreOptions
store = EmbeddingStore.open(sys.argv[1], StoreOptions(width=64, memory_rows=10))
print("open", flush=True)
sys.stdin.read()
"""


def test_given_two_processes_then_the_second_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    path = tmp_path / "table"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(StoreLocked, match=rf"{path}: already open in process {holder.pid}"):
            EmbeddingStore.open(path, OPTIONS)
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()
    EmbeddingStore.open(path, OPTIONS).close()


def test_given_the_same_directory_twice_in_one_process_then_the_second_is_refused(tmp_path: Path) -> None:
    with (
        EmbeddingStore.open(tmp_path / "table", OPTIONS),
        pytest.raises(StoreLocked, match=f"already open in process {os.getpid()}"),
    ):
        EmbeddingStore.open(tmp_path / "table", OPTIONS)


WRITER = """
import os, resource, signal, sys
import numpy as np
from stream.errors import StoreError
from stream.store import EmbeddingStore, PackedKeys, StoreOptions
how, path = sys.argv[1:]
if how == "full":
    # A file may not pass this size: to RocksDB that is a write that fails half-way, as on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
elif os.getuid() == 0:
    os.setuid(65534)
try:
    store = EmbeddingStore.open(path, StoreOptions(width=64, memory_rows=10))
    for start in range(0, 100_000, 1000):
        store.upsert(PackedKeys.from_int64(np.arange(start, start + 1000)), np.ones((1000, 64)), event_ms=1)
        store.flush()
        print("committed", start + 1000)
except StoreError as error:
    print(type(error).__name__, error)
    try:
        store.flush()
    except StoreError as again:
        print("again", type(again).__name__)
    except NameError:
        print("never opened")
"""


def run_writer(how: str, path: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", WRITER, how, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_given_a_full_disk_then_the_store_stops_and_what_was_committed_stays(tmp_path: Path) -> None:
    path = tmp_path / "table"
    *committed, error, again = run_writer("full", path)

    assert error.startswith(f"StoreFull store {path}: no room while writing")
    assert "free space" in error
    assert again == "again StoreFull"
    count = int(committed[-1].split()[1])
    with EmbeddingStore.open(path, OPTIONS) as store:
        assert len(store) >= count > 0
        assert store.lookup(PackedKeys.from_int64(np.arange(count))).found.all()


def test_given_a_directory_without_write_access_then_the_store_says_so(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    *_, error, again = run_writer("read-only", locked / "table")
    assert error.startswith(f"StoreReadOnly store {locked}/table: cannot be written")
    assert again == "never opened"


CRASHER = """
import sys
import numpy as np
from stream.store import EmbeddingStore, PackedKeys, StoreOptions
store = EmbeddingStore.open(sys.argv[1], StoreOptions(width=4, memory_rows=100))
start = int(store.meta("count") or b"0")
while True:
    store.upsert(PackedKeys.from_int64(np.arange(start, start + 50)), np.full((50, 4), start), event_ms=1)
    start += 50
    store.flush({"count": str(start).encode()})
    print(start, flush=True)
"""


def test_given_sigkill_at_any_moment_then_every_flush_before_it_is_there_whole(tmp_path: Path) -> None:
    path = tmp_path / "table"
    for round_ in range(4):
        process = subprocess.Popen([sys.executable, "-c", CRASHER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3 + 5 * round_):
            flushed = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with EmbeddingStore.open(path, StoreOptions(width=4, memory_rows=100)) as store:
            count = int(store.meta("count") or b"0")
            assert count >= flushed
            found = store.lookup(PackedKeys.from_int64(np.arange(count)))
            assert found.found.all()
            assert (found.vectors[:, 0] == np.arange(count) // 50 * 50).all()


def test_given_a_copied_directory_then_it_opens_elsewhere(table: Path, tmp_path: Path) -> None:
    shutil.copytree(table, tmp_path / "copy")
    with EmbeddingStore.open(tmp_path / "copy", OPTIONS) as store:
        assert len(store) == ROWS
        assert store.lookup(KEYS).found.all()
