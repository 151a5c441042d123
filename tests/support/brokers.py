"""Where tests and benches find Apache Kafka."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["apache_home", "require_apache"]

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "kafka"


def apache_home() -> Path | None:
    """KAFKA_HOME, or the distribution beside the repository; None where it or Java is not there."""
    home = Path(os.environ.get("KAFKA_HOME") or _BESIDE)
    usable = (home / "bin" / "kafka-server-start.sh").is_file() and shutil.which("java") is not None
    return home if usable else None


def require_apache() -> Path:
    """The distribution to test on; skips where there is none, and fails in CI."""
    # Benches use this module too, and need no pytest.
    import pytest

    home = apache_home()
    if home is None:
        text = "Apache Kafka is not here: set KAFKA_HOME to a distribution and install Java 17"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    return home
