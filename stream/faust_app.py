"""The Faust app of a worker: the group's membership, and one agent that takes the blocks of the events topic."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import faust

from stream.addresses import AddressAssignor
from stream.settings import Settings
from stream.transport import BlockSchema, BlockTransport, FetchedBlock, broker_credentials

__all__ = ["make_app"]

_FOR_EVER_S = 24 * 3600.0


class _App(faust.App):
    def _new_transport(self) -> Any:
        return BlockTransport(self.conf.broker_consumer, self)


def make_app(
    settings: Settings, member: str | None, take: Callable[[Sequence[FetchedBlock]], Awaitable[None]]
) -> faust.App:
    """An app that hands each fetched block to `take`, several small ones at once, those of a partition in their order.

    Parameters
    ----------
    member: the worker's lasting name in the group; without one, the group learns of a dead worker by its session's end.
    take: what it raises ends the agent.
    """
    servers = settings.kafka.bootstrap_servers.replace(",", ";kafka://")
    app = _App(
        f"{settings.kafka.group}-workers",
        broker=f"kafka://{servers}",
        broker_credentials=broker_credentials(settings.kafka),
        broker_max_poll_records=settings.worker.batch_records,
        broker_session_timeout=settings.kafka.session_timeout_s,
        broker_heartbeat_interval=settings.kafka.session_timeout_s / 5.0,
        broker_request_timeout=max(60.0, settings.kafka.session_timeout_s + 5.0),
        # Checkpoints commit, and no block is a Faust event that could be late: Faust has nothing to warn of.
        broker_commit_livelock_soft_timeout=_FOR_EVER_S,
        stream_processing_timeout=_FOR_EVER_S,
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=member,
        consumer_max_fetch_size=max(1_048_576, 2 * settings.limits.record_bytes),
        stream_buffer_maxsize=4,
        stream_wait_empty=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        store="memory://",
        datadir=str(Path(settings.worker.data_dir) / "faust"),
        PartitionAssignor=AddressAssignor,
    )

    async def advance_states(stream: Any) -> None:
        async for blocks in stream:
            await take(blocks)

    app.agent(app.topic(settings.topics.events, schema=BlockSchema(), acks=False), name="advance_states")(
        advance_states
    )
    return app
