"""HTTP of the trainer: `/metrics` for Prometheus, `/livez` and `/readyz` for whoever restarts it, and versions.

Alive means that the process answers; ready, that it reads its topics and its last version was confirmed. `GET
/v1/versions` lists the versions that can be gone back to, `POST /v1/rollback` goes back to one; that is answered to
this machine alone, whatever address is listened on.
"""

from __future__ import annotations

import ipaddress
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from stream.errors import LivestateError, SettingsError
from stream.metrics import OTHER_ROUTE, TrainerMetrics

__all__ = ["Health", "Monitoring", "RollbackRequest", "Rollbacks"]

_ROUTES = ("/metrics", "/livez", "/readyz", "/v1/versions", "/v1/rollback")
_JSON = "application/json"
_LARGEST_BODY = 10_000
_ANSWER_S = 60.0


@dataclass
class Health:
    """What `/readyz` tells."""

    ready: bool = False


@dataclass
class RollbackRequest:
    """Somebody wants an earlier version back, and waits until `done`: `published` or `error` is set then."""

    version: int
    done: threading.Event = field(default_factory=threading.Event)
    published: int = 0
    error: LivestateError | None = None


@dataclass
class Rollbacks:
    """What HTTP and the trainer's own thread know of each other: requests, and the versions to list."""

    requests: SimpleQueue[RollbackRequest] = field(default_factory=SimpleQueue)
    list_versions: Callable[[], list[dict[str, Any]]] = list


class Monitoring:
    """Serves while the context is open; `port` is the one in use, where 0 was asked for.

    Raises
    ------
    SettingsError: the address cannot be used.
    """

    def __init__(
        self, host: str, port: int, metrics: TrainerMetrics, health: Health, rollbacks: Rollbacks | None = None
    ) -> None:
        exchange = rollbacks or Rollbacks()
        metrics.ready.set_function(lambda: health.ready)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._count(self._respond)

            def do_POST(self) -> None:
                self._count(self._roll_back)

            def _count(self, respond: Callable[[], int]) -> None:
                started = time.perf_counter()
                status = respond()
                route = self.path if self.path in _ROUTES else OTHER_ROUTE
                metrics.http.answered(route, status, time.perf_counter() - started)

            def _respond(self) -> int:
                if self.path == "/metrics":
                    return self._answer(200, generate_latest(metrics.registry), CONTENT_TYPE_LATEST)
                if self.path == "/livez":
                    return self._answer(200, b"alive\n")
                if self.path == "/readyz":
                    return self._answer(*((200, b"ready\n") if health.ready else (503, b"not ready\n")))
                if self.path == "/v1/versions":
                    return self._answer_json(200, {"versions": exchange.list_versions()})
                return self._answer(404, b"there are /metrics, /livez, /readyz and /v1/versions\n")

            def _roll_back(self) -> int:
                if self.path != "/v1/rollback":
                    return self._answer_json(404, {"detail": "there is /v1/rollback"})
                if not ipaddress.ip_address(self.client_address[0].partition("%")[0]).is_loopback:
                    return self._answer_json(403, {"detail": "rollback is answered to the trainer's own machine alone"})
                # A page in a browser here cannot ask with this type unless the server lets it.
                if self.headers.get_content_type() != _JSON:
                    return self._answer_json(415, {"detail": f"expected content-type {_JSON}"})
                try:
                    length = int(self.headers.get("Content-Length", "0"))
                    version = json.loads(self.rfile.read(min(max(length, 0), _LARGEST_BODY)))["version"]
                    if not isinstance(version, int) or isinstance(version, bool):
                        raise TypeError(f"version is {version!r}")
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    detail = f'expected {{"version": number}}: {error!r}'
                    return self._answer_json(400, {"detail": detail[:500]})
                request = RollbackRequest(version)
                exchange.requests.put(request)
                if not request.done.wait(_ANSWER_S):
                    return self._answer_json(504, {"detail": "the trainer has not come to it yet; it will"})
                if request.error is not None:
                    return self._answer_json(409, {"detail": str(request.error)})
                return self._answer_json(200, {"version": request.version, "published": request.published})

            def _answer_json(self, status: int, content: dict[str, Any]) -> int:
                return self._answer(status, json.dumps(content).encode(), _JSON)

            def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> int:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return status

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: scrapes come every few seconds."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise SettingsError(
                f"trainer.http_host = {host!r}, trainer.http_port = {port}: {error}; expected a free address"
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        """The port in use."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
