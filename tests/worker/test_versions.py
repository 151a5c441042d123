"""Versions reach every partition of their trunk, whenever it was taken over."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from stream.broker import Broker
from stream.changelog import ChangelogWriter
from stream.metrics import WorkerMetrics
from stream.model.heads import Questions
from stream.model.parameters import ParameterSet
from stream.outputs import Outputs
from stream.owned import OwnedPartition
from stream.parameter_log import Marker, ParameterReader
from stream.partition import Partition, Serving
from stream.store import EmbeddingStore, StoreOptions
from stream.versions import Versions
from stream.wire import EmbeddingEncoder, EventDecoder
from tests.support.trunk import random_trunk
from tests.worker.conftest import System


def _staged(parameters: ParameterSet, version: int) -> tuple[ParameterSet, Marker]:
    return parameters.updated({}, version), Marker(1, version, version - 1, {}, (), 0)


@contextmanager
def _restored(system: System, serving: Serving) -> Iterator[OwnedPartition]:
    decoder = EventDecoder(system.layout.schema, system.settings.limits, "msgpack")
    encoder = EmbeddingEncoder(system.layout.hidden, ["accepted"])
    store = EmbeddingStore.open(None, StoreOptions(width=system.layout.width))
    outputs, executor = Outputs(system.settings), ThreadPoolExecutor(1)
    partition = Partition(0, store, 0, decoder, encoder)
    owned = OwnedPartition(
        system.settings, system.layout.fingerprint, partition, ChangelogWriter(system.settings, 0), serving,
        outputs, executor, False,
    )  # fmt: skip
    yield owned
    owned.close()
    outputs.close()
    executor.shutdown()


def test_a_version_that_comes_during_a_restore_serves_what_was_restored(
    embedded_broker: Broker, tmp_path: Path
) -> None:
    # Given a version that a partition's restore began under
    system = System(embedded_broker, tmp_path)
    reader, held = ParameterReader(system.settings), dict[int, OwnedPartition]()
    versions = Versions(reader, system.layout, Questions(system.layout), held, WorkerMetrics())
    reader.staged = _staged(system.parameters, 1)
    versions.swap()
    serving = versions.serving
    assert serving is not None
    with _restored(system, serving) as owned:
        # When the next version comes before the restore has ended
        reader.staged = _staged(system.parameters, 2)
        versions.swap()
        held[0] = owned
        # Then the partition is served by it, and not by the one that its restore began under
        assert owned.served.version == 2
        assert versions.outdated() == []
        assert versions.applied == 2
        # And a version of another trunk leaves it as it is
        reader.staged = _staged(random_trunk(system.layout, seed=9), 3)
        versions.swap()
        assert owned.served.version == 2
        assert versions.outdated() == [(0, owned)]
        assert versions.applied == 2
