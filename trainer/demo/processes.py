"""The worker and the trainer of a run, as processes of their own, and what their metrics say."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from stream.errors import LivestateError
from stream.ports import free_port, is_free

__all__ = ["Exposition", "Interrupts", "Process", "free_ports"]

_Handler = Callable[[int, FrameType | None], object] | int | None

_SAMPLE = re.compile(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Process:
    """One `livestate` command in a process of its own; a context manager that ends it.

    Parameters
    ----------
    name: for messages and the log's name.
    arguments: of the `livestate` command.
    environment: added to this process's own.
    directory: where `<name>.log` is written.
    """

    def __init__(self, name: str, arguments: list[str], environment: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self._arguments = arguments
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C is for this program, which then ends the others in order.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stream.cli", *self._arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raises LivestateError, with the end of the log, when the process has ended."""
        if self._process is not None and self._process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
            raise LivestateError(
                f"the {self.name} ended with exit code {self._process.returncode} ({self.log}):\n{tail}"
            )

    def ask_to_stop(self) -> None:
        """SIGTERM, without waiting for the end."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self, timeout_s: float = 10.0) -> int | None:
        """SIGTERM, then SIGKILL after `timeout_s`; returns the exit code."""
        if self._process is None:
            return None
        self.ask_to_stop()
        if self._process.poll() is None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self._process.returncode

    def wait_until_ready(self, port: int, timeout_s: float) -> None:
        """Return when `/readyz` on 127.0.0.1 says so.

        Raises
        ------
        LivestateError: the process ended, or was not ready in time; with the reason it gave.
        """
        deadline = time.monotonic() + timeout_s
        reason = "it does not answer"
        while time.monotonic() < deadline:
            self.check()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                    return
            except urllib.error.HTTPError as error:
                reason = error.read().decode(errors="replace").strip()
            except OSError:
                pass
            time.sleep(0.1)
        raise LivestateError(f"the {self.name} was not ready within {timeout_s:g} s: {reason} ({self.log})")


class Exposition:
    """Metrics of one process, read over HTTP; what cannot be read keeps its last values."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}

    def refresh(self) -> None:
        """Read the metrics now."""
        try:
            with urllib.request.urlopen(self._url, timeout=2) as answer:
                text = answer.read().decode()
        except OSError:
            return
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for line in text.splitlines():
            found = _SAMPLE.match(line)
            if found:
                labels = dict(_LABEL.findall(found[2] or ""))
                samples.setdefault(found[1], []).append((labels, float(found[3])))
        self._samples = samples

    def total(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry these labels."""
        return sum(
            value
            for found, value in self._samples.get(name, ())
            if all(found.get(key) == wanted for key, wanted in labels.items())
        )

    def quantile(self, name: str, q: float) -> float | None:
        """Quantile of a histogram, linear within its bucket; None while it is empty."""
        buckets = sorted((float(labels["le"]), value) for labels, value in self._samples.get(f"{name}_bucket", ()))
        if not buckets or buckets[-1][1] == 0:
            return None
        rank, below, lower = q * buckets[-1][1], 0.0, 0.0
        for upper, count in buckets:
            if count >= rank:
                if upper == float("inf"):
                    return lower
                return lower + (upper - lower) * (rank - below) / max(count - below, 1e-12)
            below, lower = count, upper
        return lower


def free_ports(wanted: Sequence[int]) -> list[int]:
    """A port of 127.0.0.1 for each one wanted: that one where nobody listened on it a moment ago, else any.

    All are different; 0 wants any.
    """
    found: list[int] = []
    for port in wanted:
        while port == 0 or port in found or not is_free(port):
            port = free_port()
        found.append(port)
    return found


class Interrupts:
    """SIGINT and SIGTERM as one `KeyboardInterrupt` in the main thread; a context manager.

    Only the first one interrupts: what it ends is then ended in order, however often Ctrl-C is pressed. Within
    `held` it waits until the end of that, so that nothing is started that nobody will stop.
    """

    def __init__(self) -> None:
        self._before: dict[int, _Handler] = {}
        self._came = self._told = self._held = False

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        if not self._held:
            self._tell()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Put an interrupt off until the block is done."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._came:
            self._tell()
