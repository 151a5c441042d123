"""The demo's events as Kafka values, a chunk at a time.

Guarantees: each value is the MessagePack map that `stream.wire.encode_event` describes, with the same content
(number widths may differ). What repeats (a client, a store, a product with its department, category and
brand) is packed once, and numbers are written into all records of a chunk together, so that one event costs
well under a microsecond.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from stream.wire import encode_event
from trainer.demo.journey import Journey

__all__ = ["EventPacker"]

_pack = msgspec.msgpack.encode
_UINT64, _FLOAT64 = b"\xcf", b"\xcb"
_NUMBERS = ("quantity", "sales_value", "retail_disc", "coupon_disc", "coupon_match_disc")
_OF_PRODUCT = ("product_id", "department", "product_category", "brand")


class EventPacker:
    """Packs the events of one `Journey`."""

    def __init__(self, journey: Journey) -> None:
        self._journey = journey
        lines, products = journey.purchases, journey.products
        households = np.unique(np.concatenate([lines.household, journey.sends.household])).tolist()
        self._keys = {household: str(household).encode() for household in households}
        top = b"\x84" + _pack("client_id")
        self._heads = {household: top + _pack(str(household)) for household in households}
        self._stores = {store: _pack("store_id") + _pack(str(store)) for store in np.unique(lines.store).tolist()}
        attributes = [(_pack(name), getattr(products, name).tolist()) for name in _OF_PRODUCT]
        described = [
            [name + _pack(values[i]) for name, values in attributes if values[i] is not None]
            for i in range(len(products.product_id))
        ]
        self._products = [b"".join(fields) for fields in described]
        # A MessagePack map of up to 15 fields begins with one byte: 0x80 and how many.
        others = len(_NUMBERS) + len(("store_id",))
        self._map_bytes = np.asarray([0x80 | others + len(fields) for fields in described], np.uint8)
        parts: list[tuple[bytes, bytes]] = [(_pack("timestamp_ms"), _UINT64)]
        quantity, *amounts = _NUMBERS
        opening = _pack("modality") + _pack("purchase") + _pack("fields")
        parts.append((opening + b"\x80" + _pack(quantity), _UINT64))
        parts += [(_pack(name), _FLOAT64) for name in amounts]
        template = b""
        self._at: list[int] = []
        for name, marker in parts:
            if name.startswith(opening):
                self._map_at = len(template) + len(opening)
            template += name + marker
            self._at.append(len(template))
            template += bytes(8)
        self._template = np.frombuffer(template, np.uint8)

    def pack(self, part: slice) -> tuple[list[bytes], list[bytes]]:
        """Keys and values of the events of `part` of the stream order."""
        chosen = self._journey.order[part]
        purchases = len(self._journey.purchases)
        is_other = chosen >= purchases
        keys, values = self._pack_purchases(chosen[~is_other])
        if not is_other.any():
            return keys, values
        # Sends and redemptions are few: one at a time, between the purchases.
        start = range(len(self._journey))[part].start
        for at in np.flatnonzero(is_other).tolist():
            event = next(self._journey.events(slice(start + at, start + at + 1)))
            keys.insert(at, event.client_id.encode())
            values.insert(at, encode_event(*event))
        return keys, values

    def _pack_purchases(self, rows: NDArray[np.int64]) -> tuple[list[bytes], list[bytes]]:
        lines = self._journey.purchases
        width = len(self._template)
        fixed = np.tile(self._template, (len(rows), 1))
        columns: Sequence[NDArray[np.int64] | NDArray[np.float64]] = (
            lines.timestamp_ms,
            lines.quantity,
            lines.sales_value,
            lines.retail_disc,
            lines.coupon_disc,
            lines.coupon_match_disc,
        )
        for at, column in zip(self._at, columns, strict=True):
            chosen = np.ascontiguousarray(column[rows])
            big_endian = chosen.astype(chosen.dtype.newbyteorder(">"))
            fixed[:, at : at + 8] = big_endian.view(np.uint8).reshape(-1, 8)
        fixed[:, self._map_at] = self._map_bytes[lines.product[rows]]
        middle = fixed.tobytes()
        households = lines.household[rows].tolist()
        heads, stores, products = self._heads, self._stores, self._products
        values = [
            heads[household] + middle[at : at + width] + stores[store] + products[product]
            for household, at, store, product in zip(
                households,
                range(0, len(middle), width),
                lines.store[rows].tolist(),
                lines.product[rows].tolist(),
                strict=True,
            )
        ]
        keys = self._keys
        return [keys[household] for household in households], values
