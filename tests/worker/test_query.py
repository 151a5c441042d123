"""HTTP of workers on rows in memory, without a broker: what is told, to whom, and by which worker."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from stream.cli import main
from stream.clients import Clients
from stream.metrics import WorkerMetrics
from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.partition import Partition, Served
from stream.partitioner import partition_of
from stream.query import Health, QueryServer
from stream.routing import Router
from stream.settings import Settings
from stream.store import EmbeddingStore, StoreOptions
from stream.transport import FetchedBlock
from stream.wire import EmbeddingEncoder, EventDecoder, RecordBlock, Schema, decode_embedding, encode_event
from tests.support.secured import Identity, new_authority
from tests.support.settings import small_settings, write_settings
from tests.support.trunk import random_head, random_trunk

SETTINGS = small_settings(TOPICS__PARTITIONS="2", WORKER__HTTP_PORT="0", WORKER__HTTP_TIMEOUT_S="0.3")
SCHEMA = Schema.compile(SETTINGS)
LAYOUT = Layout.compile(SETTINGS, SCHEMA)
QUESTIONS = Questions(LAYOUT)
PARAMETERS = random_trunk(LAYOUT).updated(random_head("accepted", QUESTIONS.tasks[0].width), 7)
SERVED = Served(Engine(LAYOUT, PARAMETERS), QUESTIONS, QUESTIONS.heads(PARAMETERS), 7)
NOW_MS = 1_600_000_000_000
TTL_MS = 60_000
CLIENTS = [*(f"client-{i}" for i in range(40)), "with/slash", "ünï", "a b?c#d%"]
NUMBERS = range(2)
#: A client of each partition that has expired.
GONE = [next(c for i in range(100) if partition_of((c := f"gone-{i}").encode(), 2) == n) for n in NUMBERS]

Owned = dict[int, Any]


def _partition(number: int) -> tuple[Partition, dict[str, Any]]:
    """A partition, and the last embedding of each of its clients."""
    store = EmbeddingStore.open(None, StoreOptions(width=LAYOUT.width, ttl_ms=TTL_MS))
    partition = Partition(
        number,
        store,
        0,
        EventDecoder(SCHEMA, SETTINGS.limits, "msgpack"),
        EmbeddingEncoder(LAYOUT.hidden, ["accepted"]),
    )
    mine = [client for client in CLIENTS if partition_of(client.encode(), 2) == number]
    events = [(GONE[number], NOW_MS - TTL_MS, "pay")]
    events += [(client, NOW_MS + i, "pay") for i, client in enumerate(mine)]
    events += [(client, NOW_MS + 100 + i, "offer") for i, client in enumerate(mine)]
    fields: dict[str, dict[str, Any]] = {"pay": {"amount": 3.5, "merchant": "fuel"}, "offer": {"product": "loan"}}
    block = RecordBlock.from_lists(
        [client.encode() for client, _, _ in events],
        [encode_event(client, at, modality, fields[modality]) for client, at, modality in events],
        np.arange(len(events)),
        np.full(len(events), 10**13),
    )
    last: dict[str, Any] = {}
    for keys, records in partition.apply(FetchedBlock(number, 0, block), SERVED).embeddings:
        for key, record in zip(keys.to_list(), records or [], strict=False):
            last[key.decode()] = decode_embedding(record)
    return partition, last


@functools.cache
def rows() -> tuple[Owned, dict[str, Any]]:
    """Partitions with two events of each client, and one expired client; the last embedding of each."""
    made = {number: _partition(number) for number in NUMBERS}
    last = {client: embedding for _, embeddings in made.values() for client, embedding in embeddings.items()}
    return {n: SimpleNamespace(partition=partition, served=SERVED) for n, (partition, _) in made.items()}, last


def all_of_them() -> Owned:
    return dict(rows()[0])


def one(number: int) -> Owned:
    return {number: rows()[0][number]}


def health() -> Health:
    return Health(
        True,
        (),
        {
            "partitions": [0, 1], "parameter_version": 7, "rebuilding": [], "positions": {"0": 5}, "lag": {"0": None},
            "owners": {"0": None, "1": "http://b"}, "trunk": PARAMETERS.trunk_id,
        },
    )  # fmt: skip


class Site:
    """Workers with HTTP alone, each with some partitions; addresses are those of `told`."""

    def __init__(self) -> None:
        self.told: dict[int, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._servers: list[QueryServer] = []

    def call(self, coroutine: Any) -> Any:
        """The result of a coroutine on the workers' loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def worker(self, owned: Owned, settings: Settings = SETTINGS) -> str:
        """Start one; returns its address."""

        async def start() -> QueryServer:
            router = Router(settings, Clients(owned, settings), self.told.get)
            server = QueryServer(settings, WorkerMetrics(), health, router)
            await server.start()
            return server

        self._servers.append(self.call(start()))
        return self._servers[-1].address

    def close(self) -> None:
        for server in self._servers:
            self.call(server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@contextmanager
def site() -> Iterator[Site]:
    made = Site()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def workers() -> Iterator[Site]:
    """Workers of one test."""
    with site() as made:
        yield made


@pytest.fixture(scope="module")
def all_in_one() -> Iterator[str]:
    """The address of a worker with all partitions."""
    with site() as made:
        yield made.worker(all_of_them())


def get(address: str, client_id: str, **more: Any) -> requests.Response:
    return requests.get(f"{address}/v1/clients/{quote(client_id, safe='')}", timeout=10, **more)


def batch(address: str, client_ids: object, **more: Any) -> requests.Response:
    return requests.post(f"{address}/v1/clients:batchGet", json={"client_ids": client_ids}, timeout=10, **more)


def with_(**changes: object) -> Settings:
    """The settings with some of the worker's changed."""
    return msgspec.structs.replace(SETTINGS, worker=msgspec.structs.replace(SETTINGS.worker, **changes))


def assert_is_state(view: dict[str, Any]) -> None:
    """A view says what the client's last embedding said."""
    embedding = rows()[1][view["client_id"]]
    assert (view["events_seen"], view["timestamp_ms"], view["offset"]) == (
        embedding.events_seen, embedding.timestamp_ms, embedding.offset,
    )  # fmt: skip
    assert view["parameter_version"] == 7
    assert np.array(view["vector"], np.float32).tobytes() == embedding.vector.tobytes()
    assert base64.b64decode(view["vector_base64"]) == embedding.vector.tobytes()
    assert view["age_s"] > 0


# ---------------------------------------------------------------- one worker


@pytest.mark.parametrize("client_id", ["client-3", "with/slash", "ünï", "a b?c#d%"])
def test_a_client_is_served_as_its_last_embedding_was(all_in_one: str, client_id: str) -> None:
    answer = get(all_in_one, client_id)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("application/json")
    assert_is_state(answer.json())


@pytest.mark.parametrize("client_id", ["nobody", GONE[0], GONE[1], "x" * 3000])
def test_unknown_and_expired_clients_are_problems(all_in_one: str, client_id: str) -> None:
    answer = get(all_in_one, client_id)
    assert answer.status_code == 404
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert (answer.json()["status"], answer.json()["title"]) == (404, "No such client")


def test_predictions_are_of_the_row_as_it_is_and_an_average_event(all_in_one: str) -> None:
    # Given a row, and the head of the version in use
    number = partition_of(b"client-3", 2)
    found = rows()[0][number].partition.store.lookup([b"client-3"])
    question, hidden = QUESTIONS.by_task["accepted"], LAYOUT.hidden
    features = QUESTIONS.readout.features(found.vectors[:, :hidden], found.vectors[:, hidden:], found.last_event_ms)
    # When the head is asked about it, with everything it sees of an event at its center
    center = PARAMETERS["head/accepted/center"][features.shape[1] :]
    inputs = np.concatenate([features, np.tile(center, (1, 1)).astype(np.float32)], axis=1)
    assert inputs.shape[1] == question.width
    expected = float(SERVED.heads["accepted"].predict(inputs)[0, 0])
    # Then HTTP says the same
    assert get(all_in_one, "client-3").json()["predictions"]["accepted"] == pytest.approx(expected, rel=1e-6)


def test_questions_that_come_together_are_each_answered() -> None:
    # Given many questions at once: for clients with and without a row, one of them twice, one that is given up
    clients = Clients(all_of_them(), SETTINGS)
    asked = [*CLIENTS, "nobody", CLIENTS[0], *GONE]

    async def ask() -> list[dict[str, bytes | None] | BaseException]:
        questions = [asyncio.ensure_future(clients.read([client_id])) for client_id in asked]
        given_up = asyncio.ensure_future(clients.read([CLIENTS[1]]))
        await asyncio.sleep(0)
        given_up.cancel()
        answers = await asyncio.gather(*questions, given_up, return_exceptions=True)
        # And one after all of them
        return [*answers, await clients.read([CLIENTS[0]])]

    *answers, given_up, last = asyncio.run(ask())
    clients.close()
    # Then each gets its own client, and nothing else
    for client_id, answer in zip([*asked, CLIENTS[0]], [*answers, last], strict=True):
        assert isinstance(answer, dict)
        assert list(answer) == [client_id]
        if client_id in CLIENTS:
            assert_is_state(json.loads(answer[client_id] or b""))
        else:
            assert answer[client_id] is None
    assert isinstance(given_up, asyncio.CancelledError)


def test_an_error_reaches_every_question_that_waited_and_no_later_one() -> None:
    # Given rows that cannot be read, and questions at once
    owned = all_of_them()
    number = partition_of(b"client-3", 2)
    right = owned[number]
    clients = Clients(owned, SETTINGS)

    async def ask() -> list[dict[str, bytes | None] | BaseException]:
        owned[number] = SimpleNamespace(partition=None, served=SERVED)
        questions = [asyncio.ensure_future(clients.read(["client-3"])) for _ in range(3)]
        answers = await asyncio.gather(*questions, return_exceptions=True)
        owned[number] = right
        return [*answers, await clients.read(["client-3"])]

    *failed, last = asyncio.run(ask())
    clients.close()
    assert [type(answer) for answer in failed] == [AttributeError] * 3
    assert isinstance(last, dict)
    assert_is_state(json.loads(last["client-3"] or b""))


def test_many_clients_come_in_the_order_asked_for(all_in_one: str) -> None:
    # Given a question with unknown, expired and repeated clients in it
    asked = ["nobody", *reversed(CLIENTS), GONE[0], CLIENTS[0], "nobody"]
    # When it is asked
    answer = batch(all_in_one, asked).json()
    # Then each client with a row is there once, in order, and so is each without
    assert [view["client_id"] for view in answer["clients"]] == list(reversed(CLIENTS))
    assert answer["missing"] == ["nobody", GONE[0]]
    for view in answer["clients"]:
        assert_is_state(view)


@pytest.mark.parametrize(
    ("body", "content_type", "status", "said"),
    [
        (b"{", "application/json", 400, "truncated; expected an object with client_ids"),
        (b'{"client_ids": []}', "application/json", 400, "length >= 1"),
        (b'{"client_ids": [1]}', "application/json", 400, "Expected `str`"),
        (b'{"client_ids": ["a"], "fields": 1}', "application/json", 400, "unknown field `fields`"),
        (b'{"client_ids": ["\\ud800"]}', "application/json", 400, "expected an object with client_ids"),
        (json.dumps({"client_ids": ["a"] * 1001}).encode(), "application/json", 400, "length <= 1000"),
        (b'{"client_ids": ["a"]}', "text/plain", 415, "expected application/json"),
        (b" " * (9 * 1024 * 1024), "application/json", 413, "exceeded"),
    ],
)
def test_a_question_of_another_shape_is_a_problem(
    all_in_one: str, body: bytes, content_type: str, status: int, said: str
) -> None:
    answer = requests.post(
        f"{all_in_one}/v1/clients:batchGet", data=body, headers={"Content-Type": content_type}, timeout=10
    )
    assert answer.status_code == status
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert said in answer.json()["detail"]


def test_other_paths_and_methods_are_problems_too(all_in_one: str) -> None:
    answer = requests.get(f"{all_in_one}/v2/clients/1", timeout=10)
    assert (answer.status_code, answer.json()["status"]) == (404, 404)
    answer = requests.delete(f"{all_in_one}/v1/clients/1", timeout=10)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET,HEAD")
    assert answer.json()["title"] == "Method Not Allowed"


# ---------------------------------------------------------------- the document


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The served document of a worker that asks for a token."""
    token = tmp_path_factory.mktemp("api") / "token"
    token.write_text("let-me-in\n")
    with site() as made:
        address = made.worker(all_of_them(), with_(http_token_file=str(token)))
        config = SchemathesisConfig.from_dict({"headers": {"Authorization": "Bearer let-me-in"}})
        yield schemathesis.openapi.from_url(f"{address}/v1/openapi.json", config=config)


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        ("GET /v1/clients/{client_id}", GenerationMode.POSITIVE),
        ("POST /v1/clients:batchGet", GenerationMode.POSITIVE),
        ("POST /v1/clients:batchGet", GenerationMode.NEGATIVE),
        ("GET /v1/status", GenerationMode.POSITIVE),
    ],
)
def test_whatever_is_asked_the_answer_is_as_documented(api: Any, operation: str, mode: GenerationMode) -> None:
    found = {one.ok().label: one.ok() for one in api.get_all_operations()}
    assert len(found) == 3

    # Given any question that the document allows, for clients that there are too; or any that it does not allow
    @hypothesis_settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=found[operation].as_strategy(generation_mode=mode), known=st.none() | st.sampled_from(CLIENTS))
    def ask(case: Any, known: str | None) -> None:
        if mode is GenerationMode.POSITIVE and known is not None:
            if "client_id" in case.path_parameters:
                case.path_parameters["client_id"] = quote(known, safe="")
            elif isinstance(case.body, dict):
                case.body["client_ids"][0] = known
        # When it is asked, then status, headers and body are as the document says, and what is wrong is refused
        case.call_and_validate()

    ask()


def test_the_document_lists_what_is_served(all_in_one: str) -> None:
    document = requests.get(f"{all_in_one}/v1/openapi.json", timeout=10).json()
    assert sorted(document["paths"]) == ["/v1/clients/{client_id}", "/v1/clients:batchGet", "/v1/status"]
    assert "security" not in document


# ---------------------------------------------------------------- who may ask


def test_without_the_token_nothing_is_told_about_clients(workers: Site, tmp_path: Path) -> None:
    # Given a worker with a token
    token = tmp_path / "token"
    token.write_text("let-me-in\n")
    address = workers.worker(all_of_them(), with_(http_token_file=str(token)))
    # When it is asked without, or with another one, then nothing is told
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic let-me-in"}):
        for answer in (
            get(address, "client-3", headers=headers),
            batch(address, ["client-3"], headers=headers),
            requests.get(f"{address}/v1/status", headers=headers, timeout=10),
            requests.get(f"{address}/v1/anything", headers=headers, timeout=10),
        ):
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert answer.headers["Content-Type"].startswith("application/problem+json")
    # Then with it everything is, and health needs none
    right = {"Authorization": "Bearer let-me-in"}
    assert get(address, "client-3", headers=right).status_code == 200
    assert batch(address, ["client-3"], headers=right).status_code == 200
    for path in ("/livez", "/readyz", "/metrics", "/v1/openapi.json"):
        assert requests.get(address + path, timeout=10).status_code == 200


def identity(directory: Path) -> tuple[Identity, Identity]:
    """An authority and a certificate of it for this machine."""
    authority = new_authority(directory)
    return authority, authority.issue("worker", "IP:127.0.0.1")


def test_workers_with_tls_and_a_token_ask_each_other(
    workers: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given two workers with a partition each, a certificate and a token
    authority, own = identity(tmp_path)
    token = tmp_path / "token"
    token.write_text("let-me-in\n")
    secured = with_(
        http_token_file=str(token), http_ca_file=str(authority.certificate),
        http_certificate_file=str(own.certificate), http_key_file=str(own.key),
    )  # fmt: skip
    addresses = [workers.worker(one(number), secured) for number in NUMBERS]
    workers.told |= dict(zip(NUMBERS, addresses, strict=True))
    assert all(address.startswith("https://127.0.0.1:") for address in addresses)
    # When one is asked for all clients, then it answers for all
    asks = {"headers": {"Authorization": "Bearer let-me-in"}, "verify": str(authority.certificate)}
    assert len(batch(addresses[0], CLIENTS, **asks).json()["clients"]) == len(CLIENTS)
    # And so it does for the command
    file = write_settings(
        tmp_path / "settings.toml",
        f"""
[worker]
http_token_file = "{token}"
http_ca_file = "{authority.certificate}"
http_certificate_file = "{own.certificate}"
http_key_file = "{own.key}"
""",
    )
    command = ["get", "--settings", str(file), "--worker", addresses[1], "client-1", "client-2"]
    assert main([*command, "--json"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert_is_state(json.loads(line))
    assert main([*command, "nobody"]) == 8
    said = capsys.readouterr()
    assert "client client-1: 2 events" in said.out
    assert "accepted: 0." in said.out
    assert "no state of client 'nobody'" in said.err
    token.write_text("another\n")
    assert main(command) == 2
    assert "asks for another token than worker.http_token_file" in capsys.readouterr().err
    # Who does not trust the authority is not served
    with pytest.raises(requests.exceptions.SSLError):
        get(addresses[0], "client-1")


# ---------------------------------------------------------------- which worker


def test_any_worker_answers_for_any_client(workers: Site) -> None:
    # Given two workers with a partition each
    addresses = [workers.worker(one(number)) for number in NUMBERS]
    workers.told |= dict(zip(NUMBERS, addresses, strict=True))
    for address in addresses:
        # When each is asked for each client, one by one and together, then it answers
        for client_id in CLIENTS:
            assert_is_state(get(address, client_id).json())
        answer = batch(address, [*CLIENTS, "nobody"]).json()
        assert [view["client_id"] for view in answer["clients"]] == CLIENTS
        assert answer["missing"] == ["nobody"]
        assert get(address, "nobody").status_code == 404


def test_a_worker_may_name_the_owner_instead(workers: Site) -> None:
    # Given workers that redirect
    addresses = [workers.worker(one(number), with_(http_routing="redirect")) for number in NUMBERS]
    workers.told |= dict(zip(NUMBERS, addresses, strict=True))
    client_id = next(client for client in CLIENTS if partition_of(client.encode(), 2) == 1 and "/" not in client)
    # When one is asked for a client of the other
    answer = get(addresses[0], client_id, allow_redirects=False)
    # Then it says where the client is, and whoever follows is served
    assert (answer.status_code, answer.headers["Location"]) == (307, f"{addresses[1]}/v1/clients/{client_id}")
    assert_is_state(get(addresses[0], client_id).json())
    assert get(addresses[1], client_id, allow_redirects=False).status_code == 200
    # And questions for many are answered all the same
    assert len(batch(addresses[0], CLIENTS).json()["clients"]) == len(CLIENTS)


def test_a_question_waits_while_a_partition_changes_hands(workers: Site) -> None:
    # Given a worker whose partition is on its way to another one, which does not have it yet
    patient = with_(http_timeout_s=20.0)
    coming: Owned = one(0)
    first, second = workers.worker({}, patient), workers.worker(coming, patient)
    workers.told |= {0: first, 1: first}
    asked_first = next(client for client in CLIENTS if partition_of(client.encode(), 2) == 1)
    answers: list[requests.Response] = []
    asking = threading.Thread(target=lambda: answers.append(get(first, asked_first)))
    asking.start()
    # When the assignment is known, and then the partition is restored
    workers.told |= {0: second, 1: second}
    assert_is_state(get(first, next(c for c in CLIENTS if partition_of(c.encode(), 2) == 0)).json())
    assert not answers
    coming |= one(1)
    asking.join(20)
    # Then the question that was waiting is answered
    assert_is_state(answers[0].json())


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (lambda addresses: {}, "changes hands"),
        (lambda addresses: {0: "http://127.0.0.1:1", 1: "http://127.0.0.1:1"}, "does not answer"),
        (lambda addresses: {0: addresses[1], 1: addresses[0]}, "answered 503"),
    ],
    ids=["nobody knows the owner", "the owner is dead", "both think it is the other"],
)
def test_a_client_without_an_owner_is_a_problem_that_may_pass(
    workers: Site, told: Callable[[list[str]], dict[int, str]], said: str
) -> None:
    # Given workers without partitions, and wrong or no addresses
    addresses = [workers.worker({}) for _ in NUMBERS]
    workers.told |= told(addresses)
    client_id = next(client for client in CLIENTS if partition_of(client.encode(), 2) == 0)
    # When one is asked, then it gives up in time and says why
    for answer in (get(addresses[0], client_id), batch(addresses[0], [client_id])):
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert said in answer.json()["detail"]


def test_a_question_that_waits_for_rows_holds_up_nobody_else(workers: Site) -> None:
    # Given a worker whose rows are being updated, on another thread
    address = workers.worker(all_of_them())
    answers: list[requests.Response] = []
    asking = threading.Thread(target=lambda: answers.append(batch(address, CLIENTS)))
    number = partition_of(b"client-3", 2)
    with rows()[0][number].partition.store.update([b"client-3"]):
        # When many clients are asked for, which has to wait
        asking.start()
        # Then others are answered meanwhile
        for _ in range(20):
            assert requests.get(f"{address}/livez", timeout=10).status_code == 200
        assert not answers
    asking.join(10)
    assert len(answers[0].json()["clients"]) == len(CLIENTS)
