"""Something that goes on beside a test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["meanwhile"]


@contextmanager
def meanwhile(step: Callable[[], object], every_s: float) -> Iterator[None]:
    """Take the step again and again on a thread, with a pause in between; its error, if any, is raised at the end."""
    stopping = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while not stopping.wait(every_s):
                step()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
    for error in errors:
        raise error
