"""Tests and benches. They do products on one thread, as the commands do; see `stream.cli`."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
