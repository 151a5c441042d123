"""What can go wrong between the store and its directory, as errors that name the path and what to do.

Guarantees: every failure of the disk tier leaves as a StoreError. RocksDB reports failures as text, so the
kind is read from that text; one that is not known still leaves as a StoreError with the text in it.
"""

from __future__ import annotations

from pathlib import Path

from stream.errors import StoreError

__all__ = ["StoreCorrupt", "StoreFull", "StoreLocked", "StoreReadOnly", "explain"]


class StoreLocked(StoreError):
    """Another store has the directory open."""


class StoreCorrupt(StoreError):
    """Files of the directory are damaged or missing."""


class StoreFull(StoreError):
    """The file system has no room left."""


class StoreReadOnly(StoreError):
    """The directory cannot be written."""


_RECOVER = "remove the directory to have it restored from the changelog, or load a snapshot into a new directory"


def explain(path: Path, action: str, error: BaseException) -> StoreError:
    """The StoreError for a failure of `action` on the store at `path`."""
    text = str(error)
    low = text.lower()
    if "lock" in low and ("no locks available" in low or "temporarily unavailable" in low or "hold by" in low):
        return StoreLocked(f"store {path}: already open ({text}); stop the other program or give another path")
    if "no space left" in low or "disk quota" in low or "file too large" in low:
        return StoreFull(f"store {path}: no room while {action} ({text}); free space on its file system and restart")
    if "permission denied" in low or "read-only file system" in low or "operation not permitted" in low:
        return StoreReadOnly(
            f"store {path}: cannot be written while {action} ({text}); give the process's user write access"
        )
    if "corruption" in low or "checksum" in low or "no such file" in low or "does not exist" in low:
        return StoreCorrupt(f"store {path}: damaged or missing file found while {action} ({text}); {_RECOVER}")
    return StoreError(f"store {path}: {action} failed ({text}); check the file system, then restart")


def corrupt(path: Path, what: str) -> StoreCorrupt:
    """The StoreCorrupt for `what` being wrong with the directory at `path`."""
    return StoreCorrupt(f"store {path}: {what}; {_RECOVER}")
