"""Freed memory stays with the process, within its bound."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

PROGRAM = """
import resource
import numpy as np
from stream.allocator import keep_freed_memory

def faults(blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        np.ones(1_500_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_freed_memory())
faults(5)
print(faults(50))
"""


def _run(**environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" and "CI" not in os.environ, reason="of glibc's allocator")
def test_arrays_of_a_batch_are_not_mapped_anew_each_time() -> None:
    kept, faults = _run()
    assert kept == "True"
    # 1.5 MB are some 366 pages: fewer faults than that for fifty arrays together
    assert int(faults) < 366


def test_what_the_environment_says_goes_first() -> None:
    assert _run(MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
