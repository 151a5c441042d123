"""What docker-compose.yml promises, read from the file; `compose_check` shows it on a running stack."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from stream.cli import EXAMPLE
from stream.ownership import CHECKPOINT_TIMEOUT_S
from stream.settings import ENVIRONMENT_PREFIX, load
from tests.deploy.queries import ROOT, read_yaml

COMPOSE: dict[str, Any] = read_yaml("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"].startswith("livestate")]
LASTING = [name for name, service in SERVICES.items() if service["restart"] != "no"]
WORKERS = [name for name in SERVICES if name.startswith("worker-")]


def seconds(text: str) -> float:
    """A duration such as 90s or 2m."""
    found = re.fullmatch(r"(\d+)(s|m)", text)
    assert found is not None, text
    return int(found[1]) * {"s": 1, "m": 60}[found[2]]


def default_of(text: str) -> str:
    """A text with every `${NAME:-default}` replaced by its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["user"].split(":")[0] not in ("0", "root")
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(service)


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"kafka"}))
def test_the_root_filesystem_is_read_only(name: str) -> None:
    # Apache Kafka's image writes its configuration beside its programs.
    assert SERVICES[name]["read_only"] is True
    assert [entry.split(":")[0] for entry in SERVICES[name]["tmpfs"]] == ["/tmp"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_the_loopback_address_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert default_of(port).startswith("127.0.0.1:"), port


def test_published_ports_differ() -> None:
    ports = [default_of(port).split(":")[1] for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == len(set(ports))


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_bounded(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"\d+[mg]", default_of(service["mem_limit"]))
    assert service["pids_limit"] > 0
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}


@pytest.mark.parametrize("name", LASTING)
def test_lasting_services_are_restarted_watched_and_keep_their_data(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] == "CMD"
    named = [volume.split(":")[0] for volume in service["volumes"] if not volume.startswith((".", "$", "/"))]
    assert named == [name]
    assert name in COMPOSE["volumes"]


@pytest.mark.parametrize("name", LASTING)
def test_services_start_in_the_order_of_health(name: str) -> None:
    conditions = {on: rule["condition"] for on, rule in SERVICES[name].get("depends_on", {}).items()}
    if name in OURS:
        assert conditions == {"kafka": "service_healthy", "topics": "service_completed_successfully"}
    for on, condition in conditions.items():
        assert condition == ("service_healthy" if on in LASTING else "service_completed_successfully")


@pytest.mark.parametrize("name", [*WORKERS, "trainer"])
def test_a_stop_leaves_time_for_the_last_checkpoint(name: str) -> None:
    # Given the settings in use
    settings = load(EXAMPLE, {})
    # When a checkpoint is being written that the broker does not confirm, and the group does not answer either
    longest = max(CHECKPOINT_TIMEOUT_S, settings.worker.stop_timeout_s) + settings.worker.stop_timeout_s
    # Then the engine still waits for the end, and for the seconds that closing everything takes
    assert seconds(SERVICES[name]["stop_grace_period"]) >= longest + 20.0


def test_there_are_two_workers_that_differ_only_in_name_port_and_volume() -> None:
    assert WORKERS == ["worker-1", "worker-2"]
    first, second = ({**SERVICES[name], "hostname": None, "ports": None, "volumes": None} for name in WORKERS)
    assert first == second


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_known_to_the_others_by_its_services_name(name: str) -> None:
    # It listens on every address, and then tells the others the machine's name.
    settings = load(EXAMPLE, SERVICES[name]["environment"])
    assert (settings.worker.http_host, settings.worker.http_advertise) == ("0.0.0.0", None)
    assert SERVICES[name]["hostname"] == name


@pytest.mark.parametrize("name", OURS)
def test_environment_variables_are_settings(name: str) -> None:
    # As compose does where a variable is not set
    environment = {
        variable: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
        for variable, value in SERVICES[name]["environment"].items()
    }
    assert all(variable.startswith(ENVIRONMENT_PREFIX) for variable in environment)
    settings = load(EXAMPLE, environment)
    assert settings.kafka.bootstrap_servers == "kafka:9092"
    for directory in (settings.worker.data_dir, settings.trainer.data_dir):
        assert directory.startswith("/data/")


def test_health_checks_ask_the_port_in_the_settings() -> None:
    settings = load(EXAMPLE, SERVICES["trainer"]["environment"])
    for names, port in ((WORKERS, settings.worker.http_port), (["trainer"], settings.trainer.http_port)):
        for name in names:
            assert f":{port}/readyz" in SERVICES[name]["healthcheck"]["test"][-1]
            assert default_of(SERVICES[name]["ports"][0]).endswith(f":{port}")


def test_no_secret_is_in_the_environment() -> None:
    for service in SERVICES.values():
        for variable in service.get("environment", {}):
            assert not re.search("PASSWORD|SECRET|TOKEN", variable) or variable.endswith("__FILE")
    assert SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] == (
        f"/run/secrets/{SERVICES['grafana']['secrets'][0]}"
    )
    ignored = (ROOT / "deploy/secrets/.gitignore").read_text().split()
    assert ignored == ["*", "!.gitignore"]


def test_secrets_of_a_broker_are_passed_by_file() -> None:
    # Given the lines that deploy/README.md adds for a broker that asks for a password
    text = (ROOT / "deploy/README.md").read_text()
    found = re.search(r"```yaml\n(secrets:.*?)```", text, re.DOTALL)
    assert found is not None
    added = yaml.safe_load(found[1])
    # When they are read as settings
    settings = load(EXAMPLE, {**SERVICES["worker-1"]["environment"], **added["x-livestate"]["environment"]})
    # Then every file in them is a secret that is declared and lies where git does not look
    files = [settings.kafka.sasl_password_file, settings.kafka.ssl_ca_file]
    assert files == [f"/run/secrets/{name}" for name in added["x-livestate"]["secrets"]]
    assert list(added["secrets"]) == added["x-livestate"]["secrets"]
    assert all(secret["file"].startswith("./deploy/secrets/") for secret in added["secrets"].values())


def test_images_have_versions() -> None:
    for service in SERVICES.values():
        _, _, tag = default_of(service["image"]).partition(":")
        assert tag
        assert tag != "latest"


def test_mounted_files_are_there() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = default_of(volume).split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), source
                assert volume.endswith(":ro")


def test_compose_itself_accepts_the_file() -> None:
    commands = [["docker", "compose"], ["docker-compose"]]
    usable = [
        command
        for command in commands
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode
    ]
    if not usable:
        if os.environ.get("CI") == "true":
            pytest.fail("no compose is installed")
        pytest.skip("no compose is installed")
    for command in usable:
        done = subprocess.run([*command, "--profile", "demo", "config", "-q"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_image_is_built_for_a_user_without_an_installer() -> None:
    text = (ROOT / "deploy/Dockerfile").read_text()
    final = text[text.index("AS base") :]
    assert "USER 10001:10001" in final
    assert not re.search(r"\bpip\b|apt-get|curl", final), "the last stages only copy"
    # No registry is named: builds follow the configuration of who builds.
    assert not re.search(r"https?://|--index-url|\.io/|\.org/", text)


def test_the_build_context_holds_all_that_the_image_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = {
        source
        for line in (ROOT / "deploy/Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied == kept
