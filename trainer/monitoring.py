"""HTTP of the trainer: `/metrics` for Prometheus, `/livez` and `/readyz` for whoever restarts it.

Alive means that the process answers; ready, that it reads its topics and its last version was confirmed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from stream.errors import SettingsError

__all__ = ["Health", "Monitoring"]


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

    def __init__(self, host: str, port: int, registry: CollectorRegistry, health: Health) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)
                elif self.path == "/livez":
                    self._answer(200, b"alive\n")
                elif self.path == "/readyz":
                    self._answer(*((200, b"ready\n") if health.ready else (503, b"not ready\n")))
                else:
                    self._answer(404, b"there are /metrics, /livez and /readyz\n")

            def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

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
