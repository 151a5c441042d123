"""Answers for any client from any worker: its own clients from its rows, the others' by asking the workers they have.

Guaranteed: an answer comes from the rows of the partition's owner. While partitions change hands a question waits, up
to `worker.http_timeout_s`, and is asked again wherever they went; a worker that is asked by another one answers for
itself or says at once that it cannot, so that no question goes in circles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated

import aiohttp
import msgspec
from msgspec import Meta

from stream.clients import Clients
from stream.security import http_client_tls, http_token
from stream.settings import Settings

__all__ = ["FORWARDED", "LARGEST_BATCH", "BatchGet", "Router", "Unavailable"]

#: Set by a worker that asks another one.
FORWARDED = "Livestate-Forwarded"
LARGEST_BATCH = 1000
_AGAIN_S = 0.05


class BatchGet(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /v1/clients:batchGet`."""

    client_ids: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=LARGEST_BATCH)]


class _Answer(msgspec.Struct):
    clients: list[msgspec.Raw]
    missing: list[str]


class Unavailable(Exception):
    """A partition has no owner that answers; the message says why, and trying again later may help."""


class Router:
    """See the module.

    Parameters
    ----------
    clients: this worker's.
    address_of: base URL of the worker that has a partition, None where nobody knows.
    """

    def __init__(self, settings: Settings, clients: Clients, address_of: Callable[[int], str | None]) -> None:
        self._clients = clients
        self._address_of = address_of
        self._timeout_s = settings.worker.http_timeout_s
        self._tls = http_client_tls(settings.worker)
        token = http_token(settings.worker)
        self._headers = {FORWARDED: "1", "Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._session: aiohttp.ClientSession | None = None
        #: This worker's own base URL.
        self.address = ""

    def start(self, address: str) -> None:
        """Begin, where this worker is known by `address`."""
        self.address = address
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls, limit=64), headers=self._headers
        )

    async def stop(self) -> None:
        """Ask nobody any more."""
        self._clients.close()
        if self._session is not None:
            await self._session.close()

    def other_owner(self, client_id: str) -> str | None:
        """Base URL of another worker that has the client; None if it is this one or not known."""
        address = self._address_of(self._clients.partition_of(client_id))
        return None if address == self.address else address

    async def views(self, client_ids: Sequence[str], is_forwarded: bool = False) -> dict[str, bytes | None]:
        """`ClientView` of each client as JSON, None for those without a row.

        Raises
        ------
        Unavailable: not all of them could be asked for in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        found: dict[str, bytes | None] = {}
        while True:
            pending = [client_id for client_id in client_ids if client_id not in found]
            found.update(await self._clients.read(pending))
            pending = [client_id for client_id in pending if client_id not in found]
            if not pending:
                return found
            reason = "its partition is not served here"
            if not is_forwarded:
                others, reason = await self._ask_others(pending, deadline - loop.time())
                found.update(others)
                if len(others) == len(pending):
                    return found
            if is_forwarded or loop.time() > deadline:
                raise Unavailable(f"{len(pending)} of {len(client_ids)} clients cannot be answered for: {reason}")
            await asyncio.sleep(_AGAIN_S)

    async def _ask_others(self, client_ids: list[str], timeout_s: float) -> tuple[dict[str, bytes | None], str]:
        """What the owners say, and the reason where one does not say anything."""
        by_address: dict[str, list[str]] = {}
        for client_id in client_ids:
            address = self.other_owner(client_id)
            if address is not None:
                by_address.setdefault(address, []).append(client_id)
        reason = "its partition changes hands"
        found: dict[str, bytes | None] = {}
        asked = [self._ask(address, ids, max(_AGAIN_S, timeout_s)) for address, ids in by_address.items()]
        for answer in await asyncio.gather(*asked):
            if isinstance(answer, str):
                reason = answer
            else:
                found.update(answer)
        return found, reason

    async def _ask(self, address: str, client_ids: list[str], timeout_s: float) -> dict[str, bytes | None] | str:
        assert self._session is not None, "started"
        try:
            async with self._session.post(
                f"{address.rstrip('/')}/v1/clients:batchGet",
                data=msgspec.json.encode(BatchGet(client_ids)),
                timeout=aiohttp.ClientTimeout(total=timeout_s),
                allow_redirects=False,
            ) as response:
                body = await response.read()
                if response.status != 200:
                    return f"the worker at {address} answered {response.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"the worker at {address} does not answer: {error or type(error).__name__}"
        answer = msgspec.json.decode(body, type=_Answer)
        missing = set(answer.missing)
        # Both sides keep the order of the question.
        views = iter(answer.clients)
        return {client_id: None if client_id in missing else bytes(next(views)) for client_id in client_ids}
