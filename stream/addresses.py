"""Where each partition is served: every worker's HTTP address, as its group agreed.

A worker tells its address to the group when it joins, and whoever assigns the partitions tells all addresses to all
workers, with the assignment. So a worker knows the owner of each partition by the same message that makes it the owner
of its own: no further topic, no request to anybody, and never an owner of another generation than its own.

Guaranteed: the addresses are of the last assignment this worker has seen. A worker that came back under its name, but
at another address, is given what its former life had without the others being told; `has_moved` says so, and joining
again tells them. A broker that has just started may not tell of the topic yet; whoever then assigns partitions has
none to assign, which `lacks_topic` says.
Not guaranteed: that the worker at an address still owns the partition. It says so itself.
"""

from __future__ import annotations

from typing import Any

from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from faust.assignor import PartitionAssignor
from faust.assignor.client_assignment import ClientMetadata
from faust.types import TP

__all__ = ["AddressAssignor"]


class AddressAssignor(PartitionAssignor):
    """Faust's assignor, which carries `canonical_url` of each app to all others."""

    #: The group knows this worker by an address that it had before.
    has_moved = False
    #: This worker assigned the group's partitions last, and knew of none of some topic.
    lacks_topic = False

    def metadata(self, topics: set[str]) -> Any:
        """What this worker tells the group as it joins, before anybody assigns; called in the consumer's thread."""
        self.lacks_topic = False
        return super().metadata(topics)

    def assign(self, cluster: ClusterMetadata, member_metadata: Any) -> Any:
        """Assign the partitions, for the whole group; called in the consumer's thread."""
        topics = {topic for metadata in member_metadata.values() for topic in metadata.subscription}
        self.lacks_topic = not all(cluster.partitions_for_topic(topic) for topic in topics)
        return super().assign(cluster, member_metadata)

    def on_assignment(self, assignment: Any) -> None:
        """Take what was assigned; called in the consumer's thread."""
        told = ClientMetadata.loads(self._decompress(assignment.user_data))
        own = str(self._url)
        self.has_moved = told.url != own
        if self.has_moved:
            spread = dict(told.external_topic_distribution)
            spread[own] = spread.pop(told.url, {})
            mine = told.derive(url=own, external_topic_distribution=spread)
            assignment = ConsumerProtocolMemberAssignment(
                assignment.version, assignment.assignment, self._compress(mine.dumps())
            )
        super().on_assignment(assignment)

    def address_of(self, topic: str, partition: int) -> str | None:
        """Base URL of the worker that the partition was assigned to; None before the first assignment."""
        address: str | None = self._external_tps_url.get(TP(topic, partition))
        return address
