"""Questions by HTTP: latency and throughput of a worker's handlers beside a bare aiohttp handler.

    python -m tests.bench.http [--seconds N] [--connections 8] [--clients 100000] [--asked-by wrk|asyncio]

The server is a process of its own: the worker's HTTP on rows in memory, with one task's head and no events to apply, or
an aiohttp handler that answers with the same bytes and does nothing else. Each connection asks again as soon as it is
answered, for random clients. By default wrk asks where it is installed, as its own processor time is small; without it
a client of asyncio does. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
from aiohttp import web

from stream.clients import Clients
from stream.metrics import WorkerMetrics
from stream.model.engine import Engine
from stream.model.heads import Questions
from stream.model.layout import Layout
from stream.partition import Served
from stream.query import Health, QueryServer
from stream.routing import Router
from stream.settings import parse
from stream.store import EmbeddingStore, StoreOptions
from stream.wire import Schema
from tests.bench.support.site import machine
from tests.bench.support.workload import random_parameters, settings_text
from tests.support.processes import ROOT
from tests.support.trunk import random_head

__all__ = ["main"]

_BATCH = 100
_TASK = '\n[tasks.answered]\non = "buy"\n'
_NOW_MS = 1_600_000_000_000


async def _serve_worker(clients: int) -> None:
    settings = parse(settings_text() + _TASK, {"LIVESTATE_WORKER__HTTP_PORT": "0", "LIVESTATE_TOPICS__PARTITIONS": "1"})
    layout = Layout.compile(settings, Schema.compile(settings))
    questions = Questions(layout)
    parameters = random_parameters(layout).updated(random_head("answered", questions.tasks[0].width), 1)
    served = Served(Engine(layout, parameters), questions, questions.heads(parameters), 1)
    store = EmbeddingStore.open(None, StoreOptions(width=layout.width))
    rng = np.random.default_rng(1)
    for start in range(0, clients, 10_000):
        keys = [b"client-%d" % i for i in range(start, min(clients, start + 10_000))]
        store.upsert(keys, rng.normal(0, 0.3, (len(keys), layout.width)).astype(np.float32), _NOW_MS, 0)
    owned = {0: SimpleNamespace(partition=SimpleNamespace(store=store), served=served)}
    server = QueryServer(
        settings,
        WorkerMetrics(),
        lambda: Health(True, (), {}),
        Router(settings, Clients(owned, settings), lambda _: None),  # type: ignore[arg-type]
    )
    await server.start()
    print(server.address.rpartition(":")[2], flush=True)
    await asyncio.Event().wait()


async def _serve_bare(answers: dict[str, bytes]) -> None:
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=answers[request.method], content_type="application/json")

    app = web.Application()
    app.router.add_get("/v1/clients/{client_id:.+}", answer)
    app.router.add_post("/v1/clients:batchGet", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


@contextmanager
def _server(kind: str, given: str) -> Iterator[int]:
    """The port of a server process."""
    command = [sys.executable, "-m", "tests.bench.http", "--serve", kind]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(given + "\n")
        process.stdin.flush()
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _question(rng: np.random.Generator, clients: int, many: bool) -> bytes:
    ids = [f"client-{i}" for i in rng.integers(0, clients, _BATCH if many else 1).tolist()]
    if not many:
        return f"GET /v1/clients/{ids[0]} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    body = json.dumps({"client_ids": ids})
    return (
        f"POST /v1/clients:batchGet HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: bytes) -> bytes:
    writer.write(question)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    return await reader.readexactly(int(length.split(b":")[1]))


def _first_answer(port: int, question: bytes) -> str:
    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        answer = await _ask(reader, writer, question)
        writer.close()
        await writer.wait_closed()
        return answer

    return asyncio.run(ask()).decode()


def _load_by_wrk(port: int, seconds: float, connections: int, clients: int, many: bool) -> dict[str, float]:
    """Figures of a stretch, after a short one that warms up."""
    for duration in (max(1, round(0.2 * seconds)), max(1, round(seconds))):
        command = [
            "wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{duration}s",
            "--script", str(ROOT / "tests/bench/support/questions.lua"), f"http://127.0.0.1:{port}",
            "--", str(clients), str(_BATCH if many else 1),
        ]  # fmt: skip
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures: dict[str, float] = json.loads(printed.splitlines()[-1])
    assert figures.pop("wrong") == 0, printed
    return figures


async def _load_by_asyncio(port: int, seconds: float, connections: int, clients: int, many: bool) -> dict[str, float]:
    """Figures of a stretch, after a short one that warms up."""
    delays: list[float] = []
    started = time.perf_counter()
    warm, end = started + 0.2 * seconds, started + 1.2 * seconds

    async def connection(seed: int) -> None:
        rng = np.random.default_rng(seed)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        while (now := time.perf_counter()) < end:
            await _ask(reader, writer, _question(rng, clients, many))
            if now >= warm:
                delays.append(time.perf_counter() - now)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(connection(seed) for seed in range(connections)))
    p50, p99 = np.percentile(np.array(delays) * 1000.0, [50, 99])
    return {"per_s": len(delays) / seconds, "p50_ms": float(p50), "p99_ms": float(p99)}


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Measure, print, and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--asked-by", choices=("wrk", "asyncio"), default="wrk" if shutil.which("wrk") else "asyncio")
    parser.add_argument("--serve", choices=("worker", "bare"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve is not None:
        served = json.loads(sys.stdin.readline())
        if options.serve == "worker":
            asyncio.run(_serve_worker(served))
        else:
            asyncio.run(_serve_bare({method: text.encode() for method, text in served.items()}))
    figures: dict[str, object] = {"machine": machine(), "asked_by": options.asked_by}
    answers: dict[str, str] = {}
    for kind in ("worker", "bare"):
        with _server(kind, json.dumps(options.clients if kind == "worker" else answers)) as port:
            for name, many in (("one", False), (f"of_{_BATCH}", True)):
                question = _question(np.random.default_rng(0), options.clients, many)
                answers.setdefault("POST" if many else "GET", _first_answer(port, question))
                given = port, options.seconds, options.connections, options.clients, many
                found = _load_by_wrk(*given) if options.asked_by == "wrk" else asyncio.run(_load_by_asyncio(*given))
                figures |= {f"{kind}_{name}_{key}": round(value, 2) for key, value in found.items()}
                print(f"{kind} {name}: {found}")
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
