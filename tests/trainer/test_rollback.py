"""Going back to an earlier version: which ones are kept, and what happens on a live system."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from stream.cli import main
from stream.errors import ParametersError
from tests.support.processes import http_get, wait_for
from trainer.checkpoint import Changes, Database
from trainer.history import History, KeptVersion
from trainer.publisher import read_latest

from .conftest import LiveShop, NewShop
from .test_service import LEARNED, Running, running, stream

HEAD = "head/redeemed/weight"


def kept(version: int, created_ms: int) -> KeptVersion:
    return KeptVersion(version, 1, created_ms, "trunk", {"t": version}, {"t": None})


def test_recent_versions_lie_close_and_older_ones_further_apart(tmp_path: Path) -> None:
    # Given room for eight versions, and 500 that are made a second apart, some checkpoints between
    database = Database(tmp_path / "db")
    history = History(database, 8)
    for version in range(1, 501):
        history.add(kept(version, 1000 * version), {"t": b"%d" % version})
        if version % 7 == 0:
            changes: Changes = {}
            history.save(changes)
            database.write(changes)
            history.saved()
    # Then the first and the last are there, and gaps grow with age
    versions = [one.version for one in history.kept]
    assert (versions[0], versions[-1], len(versions)) == (1, 500, 8)
    gaps = np.diff(versions)
    assert gaps[-1] <= 4
    assert gaps[-1] < gaps[len(gaps) // 2] < gaps[1]
    # And what is kept comes back with its states, what is not is gone from the disk
    changes = {}
    history.save(changes)
    database.write(changes)
    again = History(database, 8)
    assert again.kept == history.kept
    assert [again.states(version) for version in versions] == [{"t": b"%d" % version} for version in versions]
    assert len(list(database.scan(b"v/"))) == 16
    with pytest.raises(ParametersError, match=f"version 3 is not kept: expected one of 1, .*{versions[-2]}, 500"):
        again[3]
    database.close()


def kept_versions(trainer: Running) -> list[dict[str, object]]:
    status, body = http_get(trainer.service.http_port, "/v1/versions")
    assert status == 200
    found: list[dict[str, object]] = json.loads(body)["versions"]
    return found


def learn(live: LiveShop, trainer: Running, first: int, clients: int) -> int:
    """Let the trainer learn from more clients; returns the version that has them."""
    events, feedback = stream(first, clients)
    live.publish(live.settings.topics.events, events)
    live.publish(live.settings.topics.feedback, feedback)
    trainer.wait(LEARNED, first + clients, task="redeemed")
    service = trainer.service.trainer
    assert service is not None
    wait_for(lambda: not service.unpublished(), 30, "all is published")
    return int(trainer.sample("livestate_parameter_version"))


def test_a_rollback_publishes_an_equal_version_and_learns_on_from_it(
    new_shop: NewShop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given a trainer that has published a version, and then learned more
    live = new_shop(TRAINER__HISTORY_INTERVAL_S="0")
    for name, value in live.environment.items():
        monkeypatch.setenv(name, value)
    with running(live) as trainer:
        good = learn(live, trainer, 0, 40)
        url = f"http://127.0.0.1:{trainer.service.http_port}"
        command = ["--settings", str(live.file), "--trainer", url]
        first = read_latest(live.settings)
        assert first is not None
        learn(live, trainer, 40, 20)
        # When it is asked for a version that is not there, then it says which are
        assert main(["rollback", "999", *command]) == ParametersError.exit_code
        assert "version 999 is not kept: expected one of 1, " in capsys.readouterr().err
        # And when it is asked for the first one, then an equal one is published
        assert main(["rollback", str(good), *command]) == 0
        latest = read_latest(live.settings)
        assert latest is not None
        assert latest[0].version > good + 1
        assert {name: tensor.tobytes() for name, tensor in latest[0].items()} == {
            name: tensor.tobytes() for name, tensor in first[0].items()
        }
        assert f"version {latest[0].version} equals version {good}" in capsys.readouterr().out
        assert main(["versions", "--json", *command]) == 0
        listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert listed == kept_versions(trainer)
        assert (listed[-1]["equals"], listed[-1]["labels"]) == (good, {"redeemed": 40})
        assert main(["versions", *command]) == 0
        assert f"equals version {good}" in capsys.readouterr().out
    # When it is started again, then it goes on from there: what was learned between is not learned again
    with running(live) as trainer:
        trainer.wait("livestate_parameter_version", 1)
        assert [one["version"] for one in kept_versions(trainer)][: len(listed)] == [one["version"] for one in listed]
        service = trainer.service.trainer
        assert service is not None
        assert service.learners["redeemed"].labels == 40
        assert service.tensors()[HEAD].tobytes() == first[0][HEAD].tobytes()
        events, feedback = stream(60, 10)
        live.publish(live.settings.topics.events, events)
        live.publish(live.settings.topics.feedback, feedback)
        trainer.wait(LEARNED, 10, task="redeemed")
        assert service.learners["redeemed"].labels == 50


def test_a_rollback_takes_an_online_trunk_back_too(new_embedded_shop: NewShop) -> None:
    # Given a trainer that learns the trunk as well
    online = {"MODEL__TRUNK": "online", "MODEL__ONLINE__LABELS": "4", "MODEL__ONLINE__LEARNING_RATE": "0.1"}
    live = new_embedded_shop(TRAINER__HISTORY_INTERVAL_S="0", **online)
    with running(live) as trainer:
        good = learn(live, trainer, 0, 60)
        first = read_latest(live.settings)
        learn(live, trainer, 60, 40)
        later = read_latest(live.settings)
        assert first is not None
        assert later is not None
        names = [name for name in first[0] if name.startswith("trunk/weight")]
        assert all(not np.array_equal(first[0][name], later[0][name]) for name in names)
        assert first[0].trunk_id == later[0].trunk_id
        # When it goes back
        assert trainer.service.trainer is not None
        steps = trainer.service.trainer.trunk.steps
        url = f"http://127.0.0.1:{trainer.service.http_port}"
        assert main(["rollback", str(good), "--settings", str(live.file), "--trainer", url]) == 0
        # Then trunk and head are those of that version, and its own rows go on under it
        latest = read_latest(live.settings)
        assert latest is not None
        assert {name: one.tobytes() for name, one in latest[0].items()} == {
            name: one.tobytes() for name, one in first[0].items()
        }
        service = trainer.service.trainer
        assert service.trunk.steps < steps
        assert np.array_equal(service.engine.parameters[names[0]], first[0][names[0]])
        # And it learns on from there
        learn(live, trainer, 100, 20)
    last = read_latest(live.settings)
    assert last is not None
    assert not np.array_equal(last[0][names[0]], first[0][names[0]])


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"version": 1}', "text/plain", 415),
        (b"no json", "application/json", 400),
        (b'{"version": "1"}', "application/json", 400),
        (b'{"version": 77}', "application/json", 409),
    ],
)
def test_a_wrong_request_is_refused_and_changes_nothing(
    new_embedded_shop: NewShop, body: bytes, kind: str, status: int
) -> None:
    live = new_embedded_shop()
    with running(live) as trainer:
        trainer.wait("livestate_parameter_version", 1)
        url = f"http://127.0.0.1:{trainer.service.http_port}/v1/rollback"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind}), timeout=30)
        assert refused.value.code == status
        assert json.loads(refused.value.read())["detail"]
    assert trainer.sample("livestate_parameter_version") == 1


def test_without_a_trainer_the_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["versions"], ["rollback", "3"]):
        assert main([*command, "--trainer", "http://127.0.0.1:9"]) == 3
        assert "no trainer answers at http://127.0.0.1:9" in capsys.readouterr().err
