"""A file of everything that was learned from: answered examples in the order they were answered.

The file is a sequence of MessagePack maps, each after its length as 4 bytes, little-endian: `standardiser`
entries, written whenever a task's center and scale become others, with the names of its inputs, and `example` entries.
It is for evaluation after the fact, such as "what would the model of mid-year have said"; nothing reads it to learn.
What was learned is in the file at once, for readers beside a running trainer; what a crash took back is cut off when
the trainer resumes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.errors import DataError
from trainer.joiner import Joined
from trainer.learner import Standardiser

__all__ = ["AnsweredExamples", "Recorder", "Scale", "read_record"]

_LENGTH = struct.Struct("<I")


class Recorder:
    """Appends to a record file.

    Parameters
    ----------
    length: bytes of the file to keep: what was written by the checkpoint that is gone on from.

    Raises
    ------
    DataError: the file cannot be written, or is shorter than `length`.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("r+b" if path.exists() else "w+b")
            size = self._file.seek(0, 2)
            if size < length:
                self._file.close()
                raise DataError(
                    f"record file {str(path)!r} has {size} bytes, the checkpoint says {length}: "
                    f"restore it, or give --record another name together with another trainer.data_dir"
                )
            self._file.truncate(length)
            self._file.seek(length)
        except OSError as error:
            raise DataError(f"record file {str(path)!r} cannot be written: {error}") from error

    def example(self, joined: Joined) -> None:
        """Append one answered example."""
        example = joined.example
        self._append(
            {
                "kind": "example",
                "task": example.task,
                "client_id": example.client_id,
                "as_of_ms": example.as_of_ms,
                "label": joined.label,
                "weight": joined.weight,
                "timestamp_ms": joined.known_ms,
                "final_ms": joined.final_ms,
                "inputs": example.inputs.tobytes(),
                "prediction": example.prediction,
                "others": example.others.tobytes(),
                "version": example.version,
            }
        )

    def standardiser(self, task: str, standardiser: Standardiser, names: Sequence[str], as_of_ms: int) -> None:
        """Append a task's center and scale from now on, the names (F,) of its inputs, and the time of the event that
        made them what they are."""
        center, scale = standardiser.fixed
        self._append(
            {
                "kind": "standardiser",
                "task": task,
                "names": list(names),
                "center": center.tobytes(),
                "scale": scale.tobytes(),
                "as_of_ms": as_of_ms,
            }
        )

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, entry: dict[str, Any]) -> None:
        packed: bytes = msgpack.packb(entry)
        self._file.write(_LENGTH.pack(len(packed)) + packed)
        # A reader beside a running trainer finds what was learned so far.
        self._file.flush()


@dataclass(frozen=True)
class Scale:
    """Center and scale (F,) of a task's inputs: in force for the labels that came after the first `after` answered
    examples, and from the event of `as_of_ms` on."""

    after: int
    as_of_ms: int
    center: NDArray[np.float64]
    scale: NDArray[np.float64]


@dataclass
class AnsweredExamples:
    """The answered examples of one task, in the order they were answered; n of them.

    `inputs` (n, F); `known_ms` (n,) when the label became known, `final_ms` (n,) when it could be learned, its
    window closed too; `label` (n,) of booleans, names of classes or numbers;
    `prediction` (n,) as served, the first of several, NaN where there was no head; `others` (n, others), NaN where
    fewer were said, see `Example`; `scales`, one after the other, none if inputs were never standardised; `names` (F,)
    of the inputs, empty as well then, and where the record was written by an earlier trainer.
    """

    client_id: list[bytes] = field(default_factory=list)
    as_of_ms: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    label: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.bool_))
    weight: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    known_ms: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    final_ms: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    inputs: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    prediction: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    others: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    scales: tuple[Scale, ...] = ()
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.client_id)

    @property
    def span_ms(self) -> int:
        """Time between the first prediction and the last."""
        return int(self.as_of_ms.max() - self.as_of_ms.min())

    def clients(self) -> NDArray[np.int64]:
        """(n,) a number for each client."""
        return np.unique(np.array(self.client_id, object), return_inverse=True)[1].astype(np.int64)

    def said(self, outputs: int) -> NDArray[np.float64]:
        """(n, outputs) the predictions as served, NaN where there was no head."""
        out = np.full((len(self), outputs), np.nan)
        out[:, 0] = self.prediction
        found = self.others[:, : outputs - 1]
        out[:, 1 : 1 + found.shape[1]] = found
        return out

    def scale_at(self, time_ms: int) -> Scale:
        """The scale that events before that time made; the first one even before it was there, as labels waited for
        it."""
        return [self.scales[0], *(one for one in self.scales[1:] if one.as_of_ms < time_ms)][-1]

    def taken(self, at: NDArray[np.int64]) -> AnsweredExamples:
        """Those at the indices `at`, which rise."""
        columns = ("as_of_ms", "label", "weight", "known_ms", "final_ms", "inputs", "prediction", "others")
        return replace(
            self,
            client_id=[self.client_id[i] for i in at.tolist()],
            scales=tuple(replace(one, after=int(np.searchsorted(at, one.after))) for one in self.scales),
            **{name: getattr(self, name)[at] for name in columns},
        )


def read_record(path: str | Path) -> dict[str, AnsweredExamples]:
    """Answered examples by task; a last entry that was cut off is left out.

    Raises
    ------
    DataError: the file cannot be read or is something else.
    """
    examples: dict[str, list[dict[str, Any]]] = {}
    scales: dict[str, list[Scale]] = {}
    names: dict[str, tuple[str, ...]] = {}
    try:
        data = Path(path).read_bytes()
        at = 0
        while at + _LENGTH.size <= len(data):
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            if at + length > len(data):
                break
            entry = msgpack.unpackb(data[at : at + length])
            at += length
            task = entry["task"]
            if entry["kind"] == "standardiser":
                scales.setdefault(task, []).append(_scale(entry, len(examples.get(task, ()))))
                names[task] = tuple(entry.get("names", ()))
            else:
                examples.setdefault(task, []).append(entry)
        return {
            task: _columns(found, tuple(scales.get(task, ())), names.get(task, ())) for task, found in examples.items()
        }
    except (OSError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise DataError(f"record file {str(path)!r} cannot be read: {error}") from error


def _scale(entry: dict[str, Any], after: int) -> Scale:
    # An earlier trainer wrote one for good, and not when.
    as_of_ms = entry.get("as_of_ms", 0)
    return Scale(after, as_of_ms, np.frombuffer(entry["center"], np.float64), np.frombuffer(entry["scale"], np.float64))


def _columns(found: list[dict[str, Any]], scales: tuple[Scale, ...], names: tuple[str, ...]) -> AnsweredExamples:
    return AnsweredExamples(
        client_id=[entry["client_id"] for entry in found],
        as_of_ms=np.array([entry["as_of_ms"] for entry in found], np.int64),
        label=np.array([entry["label"] for entry in found]),
        weight=np.array([entry["weight"] for entry in found], np.float64),
        known_ms=np.array([entry["timestamp_ms"] for entry in found], np.int64),
        final_ms=np.array([entry["final_ms"] for entry in found], np.int64),
        inputs=np.stack([np.frombuffer(entry["inputs"], np.float32) for entry in found]),
        prediction=np.array([entry["prediction"] for entry in found], np.float32),
        others=_padded([np.frombuffer(entry["others"], np.float32) for entry in found]),
        scales=scales,
        names=names,
    )


def _padded(rows: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    out = np.full((len(rows), max(map(len, rows))), np.nan, np.float32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
