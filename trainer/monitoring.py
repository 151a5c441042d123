"""HTTP of the trainer: `/metrics` for Prometheus, `/livez` and `/readyz` for whoever restarts it.

Alive means that the process answers; ready, that it reads its topics and its last version was confirmed.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from stream.errors import SettingsError
from stream.metrics import OTHER_ROUTE, TrainerMetrics

__all__ = ["Health", "Monitoring"]

_ROUTES = ("/metrics", "/livez", "/readyz")


@dataclass
class Health:
    """What `/readyz` tells."""

    ready: bool = False


class Monitoring:
    """Serves while the context is open; `port` is the one in use, where 0 was asked for.

    Raises
    ------
    SettingsError: the address cannot be used.
    """

    def __init__(self, host: str, port: int, metrics: TrainerMetrics, health: Health) -> None:
        metrics.ready.set_function(lambda: health.ready)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                started = time.perf_counter()
                status = self._respond()
                route = self.path if self.path in _ROUTES else OTHER_ROUTE
                metrics.http.answered(route, status, time.perf_counter() - started)

            def _respond(self) -> int:
                if self.path == "/metrics":
                    return self._answer(200, generate_latest(metrics.registry), CONTENT_TYPE_LATEST)
                if self.path == "/livez":
                    return self._answer(200, b"alive\n")
                if self.path == "/readyz":
                    return self._answer(*((200, b"ready\n") if health.ready else (503, b"not ready\n")))
                return self._answer(404, b"there are /metrics, /livez and /readyz\n")

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
