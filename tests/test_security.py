"""Files that settings name for security: what cannot be used is named, and no secret is shown."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from stream.errors import SettingsError
from stream.security import asyncio_security, http_client_tls, http_server_tls, http_token, librdkafka_security
from stream.settings import Kafka, Worker
from tests.support.secured import new_authority


def both(kafka: Kafka) -> tuple[dict[str, object], dict[str, object]]:
    """What both client libraries are told."""
    return librdkafka_security(kafka), asyncio_security(kafka)


def refused(kafka: Kafka) -> str:
    """The text with which both refuse."""
    texts = set()
    for made in (librdkafka_security, asyncio_security):
        with pytest.raises(SettingsError) as error:
            made(kafka)
        texts.add(str(error.value))
    assert len(texts) == 1
    return texts.pop()


def sasl(password_file: Path) -> Kafka:
    return Kafka(security_protocol="SASL_PLAINTEXT", sasl_username="alice", sasl_password_file=str(password_file))


def test_without_security_nothing_is_read() -> None:
    assert both(Kafka()) == ({}, {"security_protocol": "PLAINTEXT"})


def test_a_password_is_the_line_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(" with spaces, and = signs \n")
    librdkafka, asyncio_ = both(sasl(path))
    assert librdkafka["sasl.password"] == asyncio_["sasl_plain_password"] == " with spaces, and = signs "
    assert librdkafka["sasl.mechanism"] == asyncio_["sasl_mechanism"] == "SCRAM-SHA-512"


@pytest.mark.parametrize("text", ["", "\n", "one\ntwo\n"])
def test_a_password_file_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "password"
    path.write_text(text)
    said = refused(sasl(path))
    assert f"kafka.sasl_password_file = {str(path)!r}: expected a file of one line" in said
    assert "two" not in said


def test_a_missing_password_file_is_named(tmp_path: Path) -> None:
    assert "kafka.sasl_password_file = '" in refused(sasl(tmp_path / "nothing"))
    assert "No such file" in refused(sasl(tmp_path / "nothing"))


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    # Given an authority, and a certificate with a key that has a password
    authority = new_authority(tmp_path)
    mine = authority.issue("mine", key_password="secret")
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("secret\n")
    wrong.write_text("another\n")

    def client(ca: Path = authority.certificate, key: Path = mine.key, password: Path | None = right) -> Kafka:
        return Kafka(
            security_protocol="SSL", ssl_ca_file=str(ca), ssl_certificate_file=str(mine.certificate),
            ssl_key_file=str(key), ssl_key_password_file=None if password is None else str(password),
        )  # fmt: skip

    # When all fit, then brokers are verified, with their names
    librdkafka, asyncio_ = both(client())
    context = asyncio_["ssl_context"]
    assert isinstance(context, ssl.SSLContext)
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert librdkafka["ssl.endpoint.identification.algorithm"] == "https"
    # When one does not, then it is named; nobody is asked for a password at the terminal
    for kafka, said in [
        (client(ca=tmp_path / "nothing"), "kafka.ssl_ca_file = '"),
        (client(ca=right), "expected a file of certificates in PEM"),
        (client(key=authority.key), "kafka.ssl_key_file = '"),
        (client(password=wrong), "kafka.ssl_key_password_file = '"),
        (client(password=None), "kafka.ssl_key_password_file = None"),
    ]:
        assert said in refused(kafka)


@pytest.mark.parametrize("text", ["", "two\nlines\n", "with blanks\n", "ünï\n"])
def test_a_token_that_no_header_can_carry_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"worker\.http_token_file = '.*': expected") as error:
        http_token(Worker(http_token_file=str(path)))
    assert "blanks\n" not in str(error.value)


def test_files_of_http_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    # Given an authority, and a certificate whose key has a password
    authority = new_authority(tmp_path)
    mine = authority.issue("mine", key_password="secret")
    assert http_server_tls(Worker()) is None
    assert http_token(Worker()) is None
    # When files do not fit, then they are named; nobody is asked for a password at the terminal
    for key in (mine.key, authority.key, tmp_path / "nothing"):
        with pytest.raises(SettingsError, match=r"worker\.http_key_file = '"):
            http_server_tls(Worker(http_certificate_file=str(mine.certificate), http_key_file=str(key)))
    with pytest.raises(SettingsError, match=r"worker\.http_ca_file = '"):
        http_client_tls(Worker(http_ca_file=str(tmp_path / "nothing")))
