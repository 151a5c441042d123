"""Who Livestate's programs are and whom they trust: its Kafka clients, of both libraries from one set of settings, and
HTTP.

Guaranteed: passwords are read from files, each time a client is made, and reach neither a log nor an error;
certificates of brokers are verified, their host names too, wherever TLS is on. `refusal` tells a broker that will
never let this client in from one that is not there yet.
Not guaranteed: that a client which is connected notices a changed password; it has to be started again.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaError

from stream.errors import SettingsError
from stream.settings import Kafka, Worker

__all__ = [
    "asyncio_security",
    "http_client_tls",
    "http_server_tls",
    "http_token",
    "librdkafka_security",
    "refusal",
]

_PROBE_TIMEOUT_S = 2.0
_API_METADATA, _METADATA_VERSION = 3, 4


def librdkafka_security(kafka: Kafka) -> dict[str, Any]:
    """Configuration of a confluent-kafka client.

    Raises
    ------
    SettingsError: a file that the settings name cannot be used.
    """
    if kafka.security_protocol == "PLAINTEXT":
        return {}
    config: dict[str, Any] = {"security.protocol": kafka.security_protocol}
    if "SSL" in kafka.security_protocol:
        # What is wrong with a file is said in terms of the settings, whoever is asked first.
        _ssl_context(kafka)
        config["ssl.endpoint.identification.algorithm"] = "https"
        files = {
            "ssl.ca.location": kafka.ssl_ca_file,
            "ssl.certificate.location": kafka.ssl_certificate_file,
            "ssl.key.location": kafka.ssl_key_file,
        }
        config |= {name: path for name, path in files.items() if path is not None}
        if kafka.ssl_key_password_file is not None:
            config["ssl.key.password"] = _secret("kafka.ssl_key_password_file", kafka.ssl_key_password_file)
    if "SASL" in kafka.security_protocol:
        config["sasl.mechanism"] = kafka.sasl_mechanism
        config["sasl.username"] = kafka.sasl_username
        config["sasl.password"] = _password(kafka)
    return config


def asyncio_security(kafka: Kafka) -> dict[str, Any]:
    """Keyword arguments of aiokafka's clients.

    Raises
    ------
    SettingsError: a file that the settings name cannot be used.
    """
    arguments: dict[str, Any] = {"security_protocol": kafka.security_protocol}
    if "SSL" in kafka.security_protocol:
        arguments["ssl_context"] = _ssl_context(kafka)
    if "SASL" in kafka.security_protocol:
        arguments["sasl_mechanism"] = kafka.sasl_mechanism
        arguments["sasl_plain_username"] = kafka.sasl_username
        arguments["sasl_plain_password"] = _password(kafka)
    return arguments


def refusal(kafka: Kafka, errors: Sequence[KafkaError]) -> str | None:
    """Why waiting longer for the broker is of no use, and what to check; None where it may be.

    Parameters
    ----------
    errors: what librdkafka has reported on its way to the broker.
    """
    for error in errors:
        text = error.str()
        if error.code() == KafkaError._AUTHENTICATION:
            return (
                f"{text}; check kafka.sasl_username = {kafka.sasl_username!r}, the password in "
                f"kafka.sasl_password_file = {kafka.sasl_password_file!r}, and kafka.sasl_mechanism = "
                f"{kafka.sasl_mechanism!r}"
            )
        if "SSL alert" in text:
            return (
                f"{text}; check kafka.ssl_certificate_file = {kafka.ssl_certificate_file!r}: the broker asks for a "
                f"certificate that it trusts"
            )
        # Of a failed handshake, sometimes only its second error is told, without the code.
        if error.code() == KafkaError._SSL or "SSL routines" in text:
            return (
                f"{text}; check that kafka.ssl_ca_file = {kafka.ssl_ca_file!r} holds the authority of the broker's "
                f"certificate, and that this is issued for a name in kafka.bootstrap_servers = "
                f"{kafka.bootstrap_servers!r}"
            )
    if any("Connect to" in error.str() for error in errors):
        return None
    # A broker that closes connections says no more than that, and one that is not ready yet may do the same.
    for address in kafka.bootstrap_servers.split(","):
        found = _closed_by(kafka, address.strip())
        if found is not None:
            return found
    return None


def http_server_tls(worker: Worker) -> ssl.SSLContext | None:
    """What a worker's HTTP server speaks TLS with; None where it does not.

    Raises
    ------
    SettingsError: a file that the settings name cannot be used.
    """
    if worker.http_certificate_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(worker.http_certificate_file, worker.http_key_file, lambda: "")
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"worker.http_certificate_file = {worker.http_certificate_file!r} with worker.http_key_file = "
            f"{worker.http_key_file!r}: {_reason(error)}; expected a certificate and its private key in PEM, without "
            f"a password"
        ) from error
    return context


def http_client_tls(worker: Worker) -> ssl.SSLContext:
    """How other workers are verified.

    Raises
    ------
    SettingsError: a file that the settings name cannot be used.
    """
    return _trusting("worker.http_ca_file", worker.http_ca_file)


def http_token(worker: Worker) -> str | None:
    """The bearer token that questions have to carry, if any.

    Raises
    ------
    SettingsError: its file cannot be used.
    """
    path = worker.http_token_file
    if path is None:
        return None
    token = _secret("worker.http_token_file", path)
    if not token.isascii() or not token.isprintable() or " " in token:
        raise SettingsError(f"worker.http_token_file = {path!r}: expected printable ASCII without blanks")
    return token


def _closed_by(kafka: Kafka, address: str) -> str | None:
    """What is wrong with the protocol, if the listener there can be made to show it."""
    protocol = kafka.security_protocol
    said = f"kafka.security_protocol = {protocol!r}: the listener at {address}"
    speaks_tls, lets_in = _try(address, with_tls=True)
    if speaks_tls and "SSL" not in protocol:
        return f"{said} speaks TLS; expected SSL, or SASL_SSL where it asks for a password"
    if speaks_tls:
        is_refused = not lets_in
    else:
        speaks_kafka, lets_in = _try(address, with_tls=False)
        if speaks_kafka and "SSL" in protocol:
            return f"{said} does not speak TLS; expected PLAINTEXT, or SASL_PLAINTEXT where it asks for a password"
        is_refused = speaks_kafka and not lets_in
    if is_refused and "SASL" not in protocol and kafka.ssl_certificate_file is None:
        return f"{said} lets nobody in without a password; expected SASL_{protocol}"
    return None


def _try(address: str, with_tls: bool) -> tuple[bool, bool]:
    """(whether the listener there speaks Kafka's protocol in this way, whether it lets somebody unknown in).

    With TLS the handshake alone shows it. Nothing that is worth protecting is sent.
    """
    host, _, port = address.rpartition(":")
    speaks = False
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT_S) as plain:
            if not with_tls:
                _ask(plain, 18, 0, b"")
                speaks = True
                _ask(plain, _API_METADATA, _METADATA_VERSION, struct.pack(">i?", 0, False))
                return True, True
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            with context.wrap_socket(plain, server_hostname=host) as wrapped:
                speaks = True
                _ask(wrapped, _API_METADATA, _METADATA_VERSION, struct.pack(">i?", 0, False))
                return True, True
    except TimeoutError:
        # It has neither let us in nor closed the connection.
        return speaks, True
    except (OSError, ValueError):
        return speaks, False


def _ask(connection: socket.socket, api: int, version: int, body: bytes) -> None:
    """Send a request and wait for its answer, whatever it says; ConnectionError if there is none."""
    client = b"livestate"
    request = struct.pack(">hhih", api, version, 1, len(client)) + client + body
    connection.sendall(struct.pack(">i", len(request)) + request)
    header = b""
    while len(header) < 8:
        received = connection.recv(8 - len(header))
        if not received:
            raise ConnectionError("closed")
        header += received
    if struct.unpack(">i", header[4:]) != (1,):
        raise ConnectionError("not Kafka's protocol")


def _password(kafka: Kafka) -> str:
    assert kafka.sasl_password_file is not None, "checked with the settings"
    return _secret("kafka.sasl_password_file", kafka.sasl_password_file)


def _secret(name: str, path: str) -> str:
    """The first line of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingsError(f"{name} = {path!r}: {why}; expected a file with the secret in it") from error
    lines = text.splitlines()
    if len(lines) != 1 or not lines[0]:
        raise SettingsError(f"{name} = {path!r}: expected a file of one line, the secret; it has {len(lines)}")
    return lines[0]


def _ssl_context(kafka: Kafka) -> ssl.SSLContext:
    context = _trusting("kafka.ssl_ca_file", kafka.ssl_ca_file)
    if kafka.ssl_certificate_file is not None:
        # Without a password OpenSSL would ask the terminal for one.
        path = kafka.ssl_key_password_file
        password = _secret("kafka.ssl_key_password_file", path) if path is not None else ""
        try:
            context.load_cert_chain(kafka.ssl_certificate_file, kafka.ssl_key_file, lambda: password)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"kafka.ssl_certificate_file = {kafka.ssl_certificate_file!r} with kafka.ssl_key_file = "
                f"{kafka.ssl_key_file!r}: {_reason(error)}; expected a certificate and its private key in PEM, and "
                f"kafka.ssl_key_password_file = {path!r} to hold the key's password, if it has one"
            ) from error
    return context


def _trusting(name: str, ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"{name} = {ca_file!r}: {_reason(error)}; expected a file of certificates in PEM"
        ) from error


def _reason(error: OSError) -> str:
    # An SSLError is an OSError, too.
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return error.strerror or str(error)
