"""Who a worker is to its group.

A worker's data directory gives it a name that outlives its process. The group knows the worker by it (static
membership, KIP-345), so a worker that was killed and started again has its partitions back at once, instead of
after the session of its former life has timed out. A worker that is told to stop leaves for good, so that the
others need not wait either.

Guaranteed: two processes never have one name at a time; the second is refused. A new directory is a new name.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stream.errors import StoreError
from stream.store import StoreLocked

__all__ = ["Membership", "leave_for_good"]

_FILE = "worker-id"


class Membership:
    """A data directory's name, held until it is closed; a context manager.

    Parameters
    ----------
    directory: of the worker; it exists.

    Raises
    ------
    StoreLocked: another process holds it.
    StoreError: the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / _FILE
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error.strerror}; worker.data_dir must be") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise StoreLocked(
                f"{directory} is in use by another worker: give each worker a worker.data_dir of its own"
            ) from error
        name = os.pread(self._file, 64, 0).decode("ascii", "replace").strip()
        if not _is_name(name):
            # Empty at first, or cut short by a crash; either way nobody knows this directory by a name yet.
            name = uuid.uuid4().hex
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, name.encode(), 0)
        self.name = name

    def close(self) -> None:
        """Let another process have the name."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_name(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)


def leave_for_good(consumer: Any) -> None:
    """Have an aiokafka consumer leave its group when it stops, also as a static member."""
    coordinator = consumer._coordinator
    # A coordinator without a group (manual assignment) has no such attribute; then there is nothing to leave.
    if hasattr(coordinator, "_group_instance_id"):
        coordinator._group_instance_id = None
