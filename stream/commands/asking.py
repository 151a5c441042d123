"""How commands ask a worker by HTTP: its address, token and TLS as the settings say."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from stream.errors import BrokerError, SettingsError
from stream.security import http_client_tls, http_token
from stream.settings import Worker

__all__ = ["ask", "local_address", "worker_address"]


def worker_address(worker: Worker) -> str:
    """Base URL at which the settings say that a worker is."""
    scheme = "http" if worker.http_certificate_file is None else "https"
    return worker.http_advertise or local_address(scheme, worker.http_host, worker.http_port)


def local_address(scheme: str, host: str, port: int) -> str:
    """Base URL of a server that listens on `host`, which may be every address, of this machine."""
    host = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def ask(worker: Worker, base: str, path: str, question: dict[str, Any] | None = None, timeout_s: float = 30.0) -> bytes:
    """The body of the answer to a GET, or with a question to a POST of it as JSON.

    Raises
    ------
    SettingsError: the worker wants another token.
    BrokerError: nobody answers, or with an error.
    """
    headers = {} if question is None else {"Content-Type": "application/json"}
    token = http_token(worker)
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    url = f"{base.rstrip('/')}{path}"
    try:
        body = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=timeout_s, context=http_client_tls(worker)) as answer:
            found: bytes = answer.read()
            return found
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise SettingsError(
                f"{base} asks for another token than worker.http_token_file = {worker.http_token_file!r} holds"
            ) from error
        raise BrokerError(f"{url} answered {error.code}: {_detail(error)}") from error
    except (urllib.error.URLError, TimeoutError, ValueError, OSError) as error:
        raise BrokerError(
            f"no worker answers at {base}: {error}; is it running? give its address with --worker"
        ) from error


def _detail(error: urllib.error.HTTPError) -> str:
    """What a problem body says, or the text of the answer."""
    text = error.read(10_000).decode("utf-8", "replace")
    try:
        return str(json.loads(text)["detail"])
    except (ValueError, KeyError, TypeError):
        return text.strip().replace("\n", "; ") or error.reason
