"""HTTP on each worker: health, metrics, and the state of one client.

Not guaranteed: that this worker owns the client asked for; it answers 404 for clients of other workers.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from stream.errors import SettingsError

__all__ = ["ClientView", "Health", "QueryServer"]


@dataclass(frozen=True)
class Health:
    """`live`: the process does its work. `reasons`: why it is not ready; empty when it is."""

    live: bool
    reasons: tuple[str, ...]
    status: Mapping[str, Any]


@dataclass(frozen=True)
class ClientView:
    """A client's state as served: `vector` (W,) float32, and what it is the state of."""

    client_id: str
    events_seen: int
    timestamp_ms: int
    offset: int
    parameter_version: int
    vector: NDArray[np.float32]

    def as_json(self) -> dict[str, Any]:
        """The view as JSON values; the vector as numbers and as base64 of float32, little endian."""
        little = self.vector.astype("<f4")
        return {
            "client_id": self.client_id,
            "events_seen": self.events_seen,
            "timestamp_ms": self.timestamp_ms,
            "offset": self.offset,
            "parameter_version": self.parameter_version,
            "vector": [float(x) for x in little],
            "vector_base64": base64.b64encode(little.tobytes()).decode(),
        }


class QueryServer:
    """The HTTP server; port 0 takes a free one (see `port` after `start`)."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        health: Callable[[], Health],
        view: Callable[[bytes], ClientView | None] | None = None,
    ) -> None:
        self._host = host
        self.port = port
        self._registry = registry
        self._health = health
        self._view = view
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Raises SettingsError when the address cannot be bound."""
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        if self._view is not None:
            app.router.add_get("/v1/clients/{client_id:.+}", self._client)
        app.router.add_get("/v1/status", self._status)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self.port)
        try:
            await site.start()
        except OSError as error:
            raise SettingsError(
                f"HTTP cannot listen on {self._host}:{self.port}: {error.strerror}; expected a free port in "
                f"http_port (0 takes any)"
            ) from error
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close the server."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _livez(self, _: web.Request) -> web.Response:
        live = self._health().live
        return web.Response(text="ok\n" if live else "failed\n", status=200 if live else 503)

    async def _readyz(self, _: web.Request) -> web.Response:
        reasons = self._health().reasons
        return web.Response(
            text="ready\n" if not reasons else "\n".join(reasons) + "\n", status=503 if reasons else 200
        )

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response(dict(self._health().status))

    async def _client(self, request: web.Request) -> web.Response:
        client_id = request.match_info["client_id"]
        view = self._view(client_id.encode()) if self._view is not None else None
        if view is None:
            problem = {
                "type": "about:blank",
                "title": "No such client",
                "status": 404,
                "detail": f"this worker has no state of client {client_id!r}",
            }
            return web.Response(text=json.dumps(problem), status=404, content_type="application/problem+json")
        return web.json_response(view.as_json())
