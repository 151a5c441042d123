"""Files that people hand to the trainer: parameter sets, and events and feedback for pretraining.

A parameter file is a MessagePack map of tensors (name, dtype, shape, bytes); it is written beside the old one
and renamed, so a reader sees one or the other. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgpack

from stream.errors import DataError, ParametersError, RecordError
from stream.model.parameters import ParameterSet, decode_tensor, encode_tensor
from stream.settings import Settings
from stream.wire import FeedbackRecord, RecordBlock, decode_feedback

__all__ = ["load_parameters", "read_event_file", "read_feedback_file", "save_parameters"]

_FORMAT = "livestate-parameters-1"
_BLOCK_RECORDS = 4096
_JSON = (("content-type", b"application/json"),)


def save_parameters(path: str | Path, parameters: ParameterSet) -> None:
    """Write a parameter set.

    Raises
    ------
    DataError: the file cannot be written.
    """
    path = Path(path)
    tensors = [encode_tensor(name, parameters.version, tensor) for name, tensor in parameters.items()]
    packed = msgpack.packb({"format": _FORMAT, "version": parameters.version, "tensors": tensors})
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(packed)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DataError(f"parameters cannot be written to {str(path)!r}: {error}") from error


def load_parameters(path: str | Path) -> ParameterSet:
    """Read what `save_parameters` wrote.

    Raises
    ------
    DataError: the file cannot be read or is no parameter file.
    """
    try:
        content = msgpack.unpackb(Path(path).read_bytes())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {_FORMAT!r}")
        decoded = [decode_tensor(record) for record in content["tensors"]]
        return ParameterSet({name: tensor for name, _, tensor in decoded}, int(content["version"]))
    except (OSError, ValueError, KeyError, TypeError, msgpack.UnpackException, ParametersError) as error:
        raise DataError(
            f"parameters cannot be read from {str(path)!r}: {error}; expected a file written by `livestate pretrain`"
        ) from error


def read_event_file(path: str | Path, first_offset: int = 0) -> Iterator[RecordBlock]:
    """Blocks of the events in a file of JSON lines, one event a line, in stream order.

    The client id is also the record's key. A line that is no event becomes a record that a decoder refuses.

    Parameters
    ----------
    first_offset: offset of the first record; give the next file the one after the last.

    Raises
    ------
    DataError: the file cannot be read, or a line is no JSON map with a `client_id`.
    """
    try:
        with Path(path).open("rb") as file:
            keys: list[bytes | None] = []
            values: list[bytes | None] = []
            offset = first_offset
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                keys.append(_client_id(path, number, line))
                values.append(line.strip())
                if len(keys) == _BLOCK_RECORDS:
                    yield _block(keys, values, offset)
                    offset += len(keys)
                    keys, values = [], []
            if keys:
                yield _block(keys, values, offset)
    except OSError as error:
        raise DataError(f"events cannot be read from {str(path)!r}: {error}") from error


def read_feedback_file(path: str | Path, settings: Settings) -> Iterator[FeedbackRecord]:
    """The feedback in a file of JSON lines, one label a line.

    Raises
    ------
    DataError: the file cannot be read, or a line is no feedback that the settings describe.
    """
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield decode_feedback(_client_id(path, number, line), line.strip(), _JSON, settings)
                except RecordError as error:
                    raise DataError(f"{str(path)!r} line {number} is no feedback: {error}") from error
    except OSError as error:
        raise DataError(f"feedback cannot be read from {str(path)!r}: {error}") from error


def _client_id(path: str | Path, number: int, line: bytes) -> bytes:
    try:
        client_id = json.loads(line)["client_id"]
        if not isinstance(client_id, str):
            raise TypeError(f"client_id is {client_id!r}")
        return client_id.encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{str(path)!r} line {number} is no record: {error!r}; expected a JSON map with a text client_id"
        ) from error


def _block(keys: list[bytes | None], values: list[bytes | None], offset: int) -> RecordBlock:
    # Without a time of their own, nothing in these records can lie too far in the future.
    offsets = list(range(offset, offset + len(keys)))
    return RecordBlock.from_lists(keys, values, offsets, [0] * len(keys), [_JSON] * len(keys))
