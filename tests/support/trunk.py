"""Trunks with random weights, and a trainer's publishing side reduced to one call."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from confluent_kafka import Producer

from stream.kafka import producer_config
from stream.model.engine import pack_values
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet, Tensor, encode_tensor, tensor_checksum
from stream.parameter_log import MARKER_KEY, Marker, encode_marker
from stream.settings import Settings

VALUES = {
    "pay.merchant": [b"bakery", b"fuel", b"shop-1"],
    "pay.channel": [b"web"],
    "offer.product": [b"loan"],
}


def random_trunk(layout: Layout, seed: int = 0, values: Mapping[str, list[bytes]] = VALUES) -> ParameterSet:
    """Weights of a size at which states neither vanish nor saturate."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 0.3) -> Tensor:
        return rng.normal(0.0, scale, shape).astype(np.float32)

    h = layout.hidden
    tensors: dict[str, Tensor] = {
        "trunk/scale": np.stack([np.full(layout.numbers, 0.5), np.full(layout.numbers, 2.0)]),
        "trunk/weight_ih": normal(3 * h, layout.inputs),
        "trunk/weight_hh": normal(3 * h, h),
        "trunk/bias_ih": normal(3 * h),
        "trunk/bias_hh": normal(3 * h),
    }
    for field in layout.embedded:
        known = list(values.get(field.name, []))
        tensors[f"trunk/embedding/{field.name}"] = normal(len(known) + 1, field.width, scale=1.0)
        tensors.update(pack_values(field.name, known))
    return ParameterSet(tensors)


def random_head(task: str, width: int, seed: int = 1) -> dict[str, Tensor]:
    """A logistic head with random weights."""
    rng = np.random.default_rng(seed)
    return {
        f"head/{task}/center": np.zeros(width),
        f"head/{task}/scale": np.ones(width),
        f"head/{task}/weight": rng.normal(0, 0.1, width + 1),
    }


def publish_version(settings: Settings, parameters: ParameterSet, version: int, previous: int = 0) -> None:
    """Write a whole version to the parameters topic in one transaction."""
    producer = Producer(producer_config(settings, transactional_id=f"{settings.kafka.group}-test-trainer"))
    producer.init_transactions(30)
    producer.begin_transaction()
    listed: dict[str, tuple[int, int]] = {}
    for name, tensor in parameters.items():
        record = encode_tensor(name, version, tensor)
        listed[name] = (version, tensor_checksum(record))
        producer.produce(settings.topics.parameters, key=name.encode(), value=record, partition=0)
    marker = Marker(1, version, previous, listed, (), int(time.time() * 1000))
    producer.produce(settings.topics.parameters, key=MARKER_KEY, value=encode_marker(marker), partition=0)
    producer.commit_transaction(30)
