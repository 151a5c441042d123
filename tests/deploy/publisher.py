"""Random events of the shop in `stream.cli.EXAMPLE`, and their feedback, published as a user would."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
from confluent_kafka import Producer

from stream.kafka import producer_config
from stream.partitioner import partition_of
from stream.settings import Settings
from stream.wire import FeedbackRecord, encode_event, encode_feedback
from tests.support.meanwhile import meanwhile

__all__ = ["Publisher"]

CLIENTS = 2_000


class Publisher:
    """Random purchases, campaign sends and their feedback, from this machine, confirmed by the broker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer = Producer(producer_config(settings, linger_ms=5))
        self._rng = np.random.default_rng(7)
        self._now_ms = 1_500_000_000_000
        self.ends = dict.fromkeys(range(settings.topics.partitions), 0)
        self.refused = 0
        #: Clients with an event that can be used.
        self.clients: set[bytes] = set()

    def publish(self, events: int) -> None:
        """Publish so many events, one in a thousand of them unusable; feedback for each campaign sent."""
        rng, topics = self._rng, self._settings.topics
        departments = self._settings.modalities["purchase"].fields["department"].values
        for _ in range(events):
            client = f"household-{int(rng.integers(CLIENTS))}"
            self._now_ms += int(rng.integers(1, 400))
            draw = rng.random()
            if draw < 0.001:
                value = b"\x00 no event"
                self.refused += 1
            elif draw < 0.1:
                fields = {"campaign_id": str(rng.integers(30)), "campaign_type": "Type A", "duration_days": 32}
                coupons = [rng.integers(5000, size=3).tolist() for _ in range(rng.integers(9))]
                fields |= {"coupons": len(coupons), "products": coupons}
                value = encode_event(client, self._now_ms, "campaign_send", fields)
                label = FeedbackRecord(
                    client, self._now_ms + 1, self._now_ms, "redeemed", bool(rng.random() < 0.3)
                )  # fmt: skip
                self._send(topics.feedback, client, encode_feedback(label))
            else:
                prices = {name: float(rng.normal()) for name in ("retail_disc", "coupon_disc", "coupon_match_disc")}
                fields = {
                    "product_id": str(rng.integers(5000)), "store_id": str(rng.integers(100)),
                    "product_category": f"category-{rng.integers(300)}",
                    "department": str(rng.choice(departments)), "quantity": 1, "sales_value": 2.5,
                }  # fmt: skip
                value = encode_event(client, self._now_ms, "purchase", fields | prices)
            if not value.startswith(b"\x00"):
                self.clients.add(client.encode())
            self._send(topics.events, client, value)
            self.ends[partition_of(client.encode(), topics.partitions)] += 1
        assert self._producer.flush(120) == 0

    def _send(self, topic: str, client: str, value: bytes) -> None:
        while True:
            try:
                self._producer.produce(topic, value, client)
                break
            except BufferError:
                self._producer.poll(0.05)
        self._producer.poll(0)

    def load(self) -> AbstractContextManager[None]:
        """Publish all the while, on a thread of its own."""
        return meanwhile(lambda: self.publish(500), 0.1)
