"""Parameter sets: named tensors and tables of rows with a version, as the trainer publishes and the workers apply them.

The names before the first `/` say what a tensor belongs to: `trunk` (encoder and cell), or `head` (then the
task). Guaranteed: the tensors of a set are immutable; `trunk_id` changes with any bit of a fixed trunk, so a state can
say which trunk it was made by. A trunk that learns online carries a tensor with the id of the trunk that it began as,
and is named by that alone, whatever it has learned since. Not guaranteed: that rows stay: a set's tables are those of
its version until a later version's rows are settled in them.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from stream.errors import ParametersError
from stream.model.rows import RowTable

__all__ = ["ParameterSet", "Tensor", "decode_tensor", "encode_tensor", "tensor_checksum"]

Tensor = NDArray[Any]
#: What a tensor may hold: numbers whose bytes mean the same on every machine we run on.
_TYPES = {"<f4", "<f8", "<i4", "<i8", "|u1"}
#: Of an online trunk: the id of the trunk that it began as, eight bytes.
_ONLINE = "trunk/online"
_LARGEST_TENSOR_BYTES = 64 * 1024 * 1024


class ParameterSet(Mapping[str, Tensor]):
    """Tensors by name at one version.

    Parameters
    ----------
    tensors: name to array; arrays are copied once and made read-only.
    version: 0 for a set that was never published.
    tables: rows of category values, by the table's name.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], version: int = 0, tables: Mapping[str, RowTable] | None = None
    ) -> None:
        frozen: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            array = tensor
            if array.flags.writeable or not array.flags.c_contiguous:
                # `order="C"` keeps the shape; ascontiguousarray would turn a scalar into a vector.
                array = np.array(tensor, order="C")
                array.setflags(write=False)
            if array.dtype.str not in _TYPES:
                raise ParametersError(f"tensor {name!r} is of type {array.dtype.str}: expected one of {sorted(_TYPES)}")
            frozen[name] = array
        self._tensors = frozen
        self.version = version
        self.tables: Mapping[str, RowTable] = dict(tables or {})

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise ParametersError(f"parameters at version {self.version} have no tensor {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def updated(
        self, tensors: Mapping[str, Tensor], version: int, removed: frozenset[str] = frozenset()
    ) -> ParameterSet:
        """This set with some tensors replaced, added or removed, at another version; the tables are the same."""
        merged = {name: tensor for name, tensor in self._tensors.items() if name not in removed}
        merged.update(tensors)
        return ParameterSet(merged, version, self.tables)

    def forked(self) -> ParameterSet:
        """This set with tables of its own, so that later rows do not reach it."""
        return ParameterSet(self._tensors, self.version, {name: table.copy() for name, table in self.tables.items()})

    def settle(self) -> None:
        """Serve the rows that are staged; where nothing is gathered meanwhile."""
        for table in self.tables.values():
            table.settle()

    @property
    def is_online(self) -> bool:
        """Whether the trunk goes on learning, so that versions of one `trunk_id` differ in it."""
        return _ONLINE in self._tensors

    def of_kind(self, trunk: str) -> ParameterSet:
        """This set with its trunk `online`, named by what it is now unless it is online already, or `fixed`."""
        if (trunk == "online") == self.is_online:
            return self
        if trunk == "fixed":
            return self.updated({}, self.version, frozenset({_ONLINE}))
        return self.updated({_ONLINE: np.frombuffer(bytes.fromhex(self.trunk_id), np.uint8)}, self.version)

    @property
    def trunk_id(self) -> str:
        """16 hexadecimal digits over every bit of the trunk; of an online one `online-` and those of its beginning."""
        if _ONLINE in self._tensors:
            return f"online-{self._tensors[_ONLINE].tobytes().hex()}"
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(self._tensors):
            if name.startswith("trunk/"):
                tensor = self._tensors[name]
                digest.update(f"{name}|{tensor.dtype.str}|{tensor.shape}|".encode())
                digest.update(tensor.tobytes())
        return digest.hexdigest()


def encode_tensor(name: str, version: int, tensor: Tensor) -> bytes:
    """One record of the parameters topic: MessagePack map of name, version, dtype, shape and bytes."""
    array = np.array(tensor, order="C")
    if array.nbytes > _LARGEST_TENSOR_BYTES:
        raise ParametersError(
            f"tensor {name!r} has {array.nbytes} bytes: at most {_LARGEST_TENSOR_BYTES} fit in one record"
        )
    packed: bytes = msgpack.packb(
        {
            "name": name,
            "version": version,
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "data": array.tobytes(),
        }
    )
    return packed


def decode_tensor(record: bytes) -> tuple[str, int, Tensor]:
    """(name, version, read-only array) of a record.

    Raises
    ------
    ParametersError: the record is not what `encode_tensor` writes.
    """
    try:
        value = msgpack.unpackb(record)
        name, version, kind, shape, data = (value[key] for key in ("name", "version", "dtype", "shape", "data"))
        if kind not in _TYPES:
            raise ValueError(f"dtype {kind!r}")
        tensor = np.frombuffer(data, np.dtype(kind)).reshape(shape)
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise ParametersError(f"a parameters record cannot be read: {error}") from error
    return str(name), int(version), tensor


def tensor_checksum(record: bytes, so_far: int = 0) -> int:
    """CRC-32 over the records of a version, in the order they were written."""
    return zlib.crc32(record, so_far)
