"""HTTP on each worker: health, metrics, and the state of any client.

Guaranteed: errors under `/v1` are problem bodies (RFC 9457). Where `worker.http_token_file` is set, nothing about
clients is told without the token; health, metrics and the OpenAPI document need none. Any worker answers for any
client (`stream.routing`).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from yarl import URL

from stream.errors import SettingsError
from stream.metrics import OTHER_ROUTE, WorkerMetrics
from stream.openapi import openapi_document
from stream.routing import FORWARDED, BatchGet, Router, Unavailable
from stream.security import http_server_tls, http_token
from stream.settings import Settings

__all__ = ["Health", "QueryServer"]

logger = logging.getLogger(__name__)

#: 1,000 client ids of `limits.client_id_bytes`, each byte as an escape.
_LARGEST_BODY = 8 * 1024 * 1024
#: Counted where nobody waits for the answer any more; nginx calls it so, too.
_GONE = 499
_WILDCARDS = ("0.0.0.0", "::", "")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Health:
    """`live`: the process does its work. `reasons`: why it is not ready; empty when it is."""

    live: bool
    reasons: tuple[str, ...]
    status: Mapping[str, Any]


class QueryServer:
    """The HTTP server; port 0 takes a free one (see `address` after `start`)."""

    def __init__(
        self, settings: Settings, metrics: WorkerMetrics, health: Callable[[], Health], router: Router
    ) -> None:
        self._settings = settings.worker
        self._counts = metrics.http
        self._registry = metrics.registry
        self._health = health
        self._router = router
        self._tls = http_server_tls(settings.worker)
        self._token = http_token(settings.worker)
        self._document = json.dumps(openapi_document(settings)).encode()
        self._runner: web.AppRunner | None = None
        #: Base URL at which others reach it.
        self.address = ""

    async def start(self) -> None:
        """Raises SettingsError when the address cannot be bound."""
        around = [self._counted, self._as_problems, self._authorise]
        app = web.Application(middlewares=around, client_max_size=_LARGEST_BODY)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/v1/openapi.json", self._openapi)
        app.router.add_get("/v1/status", self._status)
        app.router.add_get("/v1/clients/{client_id:.+}", self._client)
        app.router.add_post("/v1/clients:batchGet", self._batch_get)
        # A question that waits for its partition would hold up the end.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        host, port = self._settings.http_host, self._settings.http_port
        site = web.TCPSite(self._runner, host, port, ssl_context=self._tls)
        try:
            await site.start()
        except OSError as error:
            raise SettingsError(
                f"HTTP cannot listen on {host}:{port}: {error.strerror}; expected a free port in "
                f"http_port (0 takes any)"
            ) from error
        # In the form in which the group tells it.
        self.address = str(URL(self._settings.http_advertise or self._own_address(self._runner.addresses[0][1])))
        self._router.start(self.address)

    async def stop(self) -> None:
        """Close the server."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        await self._router.stop()

    def _own_address(self, port: int) -> str:
        host = socket.gethostname() if self._settings.http_host in _WILDCARDS else self._settings.http_host
        return f"{'http' if self._tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"

    # ---------------------------------------------------------------- around every request

    @web.middleware
    async def _counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        status = _GONE
        try:
            answer = await handler(request)
            status = answer.status
        except web.HTTPException as error:
            status = error.status
            raise
        finally:
            resource = request.match_info.route.resource
            route = OTHER_ROUTE if resource is None else resource.canonical
            self._counts.answered(route, status, time.perf_counter() - started)
        return answer

    @web.middleware
    async def _as_problems(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            kept = {name: value for name, value in error.headers.items() if name in ("Allow", "WWW-Authenticate")}
            return _problem(error.status, error.reason, error.text or error.reason, **kept)
        except Unavailable as error:
            return _problem(503, "Not available now", str(error), **{"Retry-After": "1"})
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            return _problem(500, "Internal error", "the worker's log says more")

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token is not None and request.path.startswith("/v1/") and request.path != "/v1/openapi.json":
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            # Of text hmac compares ASCII only.
            given = token.strip().encode("utf-8", "surrogateescape")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._token.encode()):
                raise web.HTTPUnauthorized(
                    text="expected the header Authorization: Bearer, and the token in worker.http_token_file",
                    headers={"WWW-Authenticate": 'Bearer realm="livestate"'},
                )
        return await handler(request)

    # ---------------------------------------------------------------- health

    async def _metrics(self, _: web.Request) -> web.Response:
        # On a thread: a store may be busy for a moment, and a data directory has many files.
        body = await asyncio.get_running_loop().run_in_executor(None, generate_latest, self._registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _livez(self, _: web.Request) -> web.Response:
        live = self._health().live
        return web.Response(text="ok\n" if live else "failed\n", status=200 if live else 503)

    async def _readyz(self, _: web.Request) -> web.Response:
        reasons = self._health().reasons
        return web.Response(
            text="ready\n" if not reasons else "\n".join(reasons) + "\n", status=503 if reasons else 200
        )

    # ---------------------------------------------------------------- clients

    async def _openapi(self, _: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response({"address": self.address, **self._health().status})

    async def _client(self, request: web.Request) -> web.Response:
        client_id = request.match_info["client_id"]
        is_forwarded = FORWARDED in request.headers
        if self._settings.http_routing == "redirect" and not is_forwarded:
            owner = self._router.other_owner(client_id)
            if owner is not None:
                raise web.HTTPTemporaryRedirect(f"{owner.rstrip('/')}/v1/clients/{quote(client_id, safe='')}")
        view = (await self._router.views([client_id], is_forwarded))[client_id]
        if view is None:
            return _problem(404, "No such client", f"there is no state of client {client_id!r}")
        return web.Response(body=view, content_type="application/json")

    async def _batch_get(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text=f"Content-Type {request.content_type!r}: expected application/json")
        try:
            asked = msgspec.json.decode(await request.read(), type=BatchGet)
        except msgspec.MsgspecError as error:
            raise web.HTTPBadRequest(
                text=f"{error}; expected an object with client_ids, as /v1/openapi.json says"
            ) from error
        client_ids = list(dict.fromkeys(asked.client_ids))
        views = await self._router.views(client_ids, FORWARDED in request.headers)
        found = b",".join(view for client_id in client_ids if (view := views[client_id]) is not None)
        missing = msgspec.json.encode([client_id for client_id in client_ids if views[client_id] is None])
        return web.Response(body=b'{"clients":[%b],"missing":%b}' % (found, missing), content_type="application/json")


def _problem(status: int, title: str, detail: str, **headers: str) -> web.Response:
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/problem+json", headers=headers
    )
