"""Apache Kafka that asks who you are: TLS, client certificates and passwords, each on a port of its own.

Certificates are made when the broker starts, by `openssl`, which Debian's Java brings along.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

from stream.broker import ApacheBroker
from stream.ports import HOST

__all__ = ["PASSWORD", "USER", "Identity", "SecuredBroker", "new_authority"]

USER, PASSWORD = "alice", "correct horse, battery = staple"
#: Offset of each listener's port from the plain one's, which the broker keeps for itself; + 1 is the controller's.
_LISTENERS = {"SASL_SSL": 2, "SSL": 3, "SASL_PLAINTEXT": 4}
_SCRAM = {"SCRAM-SHA-256": ScramMechanism.SCRAM_SHA_256, "SCRAM-SHA-512": ScramMechanism.SCRAM_SHA_512}


@dataclass(frozen=True)
class Identity:
    """A certificate and its private key, PEM; the key of an authority signs others."""

    certificate: Path
    key: Path

    def issue(self, name: str, subject_alternative: str = "", key_password: str = "") -> Identity:
        """A certificate of this authority, beside it."""
        made = Identity(self.certificate.with_name(f"{name}.crt"), self.certificate.with_name(f"{name}.key"))
        request, extensions = self.certificate.with_name(f"{name}.csr"), self.certificate.with_name(f"{name}.ext")
        extensions.write_text(
            "basicConstraints=critical,CA:FALSE\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
            + (f"subjectAltName={subject_alternative}\n" if subject_alternative else "")
        )
        _new_key(made.key, key_password)
        secret = ["-passin", f"pass:{key_password}"] if key_password else []
        _openssl("req", "-new", "-key", made.key, *secret, "-subj", f"/CN={name}", "-out", request)
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key, "-CAcreateserial",
            "-days", "2", "-extfile", extensions, "-out", made.certificate,
        )  # fmt: skip
        return made


def new_authority(directory: Path, name: str = "ca") -> Identity:
    """A self-signed certificate that signs others."""
    directory.mkdir(parents=True, exist_ok=True)
    made = Identity(directory / f"{name}.crt", directory / f"{name}.key")
    _new_key(made.key)
    _openssl(
        "req", "-x509", "-new", "-key", made.key, "-days", "2", "-subj", f"/CN={name}", "-out", made.certificate,
        "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )  # fmt: skip
    return made


class SecuredBroker(ApacheBroker):
    """See the module. `USER` has `PASSWORD` by PLAIN and SCRAM; on the SSL port a client shows a certificate."""

    ports = 1 + max(_LISTENERS.values())

    def start(self) -> Self:
        self.authority = new_authority(self.directory / "certificates")
        self.identity = self.authority.issue("broker", f"IP:{HOST}")
        self.keystore = self.identity.key.with_name("keystore.pem")
        self.keystore.write_bytes(self.identity.key.read_bytes() + self.identity.certificate.read_bytes())
        self.password_file = self.directory / "password"
        self.password_file.write_text(PASSWORD + "\n")
        super().start()
        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers})
        for mechanism in _SCRAM.values():
            info = ScramCredentialInfo(mechanism, 4096)
            change = UserScramCredentialUpsertion(USER, info, PASSWORD.encode())
            admin.alter_user_scram_credentials([change])[USER].result(30)
        return self

    @property
    def environment(self) -> dict[str, str]:
        return self.environment_for("SASL_SSL")

    def address(self, protocol: str) -> str:
        """Where it listens for this security protocol."""
        return f"{HOST}:{self.port + _LISTENERS.get(protocol, 0)}"

    def environment_for(self, protocol: str = "SASL_SSL", mechanism: str = "SCRAM-SHA-512") -> dict[str, str]:
        """Settings of a client that is let in, as environment variables."""
        made = {"BOOTSTRAP_SERVERS": self.address(protocol), "SECURITY_PROTOCOL": protocol}
        if "SSL" in protocol:
            made["SSL_CA_FILE"] = str(self.authority.certificate)
        if "SASL" in protocol:
            made |= {"SASL_MECHANISM": mechanism, "SASL_USERNAME": USER, "SASL_PASSWORD_FILE": str(self.password_file)}
        return {f"LIVESTATE_KAFKA__{name}": value for name, value in made.items()}

    def _command(self) -> list[str]:
        listeners = f"PLAINTEXT://{HOST}:{self.port}," + ",".join(f"{p}://{self.address(p)}" for p in _LISTENERS)
        plain = "org.apache.kafka.common.security.plain.PlainLoginModule"
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule"
        self.properties |= {
            "listeners": f"{listeners},CONTROLLER://{HOST}:{self.port + 1}",
            "advertised.listeners": listeners,
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.keystore),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.authority.certificate),
            "listener.name.ssl.ssl.client.auth": "required",
        }
        for listener in ("sasl_ssl", "sasl_plaintext"):
            prefix = f"listener.name.{listener}"
            self.properties[f"{prefix}.plain.sasl.jaas.config"] = f'{plain} required user_{USER}="{PASSWORD}";'
            for mechanism in _SCRAM:
                self.properties[f"{prefix}.{mechanism.lower()}.sasl.jaas.config"] = f"{scram} required;"
        return super()._command()


def _new_key(path: Path, password: str = "") -> None:
    options = ["-aes256", "-pass", f"pass:{password}"] if password else []
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", *options, "-out", path)


def _openssl(*arguments: str | Path) -> None:
    if shutil.which("openssl") is None:
        text = "certificates cannot be made: install openssl"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
