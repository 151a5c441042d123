"""The real year, read once; it is never changed by a test."""

import pytest

from trainer.demo.journey import Journey, load


@pytest.fixture(scope="session")
def journey() -> Journey:
    return load()
