"""Log lines that say the same again and again: once, and then every so often with how many there were.

Client libraries report each attempt to reach a broker, several times a second for as long as it is away.

Guaranteed: the first of its kind always passes, and so does what is logged by anybody but those libraries.
"""

from __future__ import annotations

import logging
import math
import threading

__all__ = ["Seldom"]

_INTERVAL_S = 30.0
#: aiokafka's own, and where librdkafka's lines go.
_LOGGERS = ("aiokafka", "stream.kafka")


class Seldom(logging.Filter):
    """For a handler. Lines are of one kind if logger, level and text agree, whatever is filled into the text.

    Parameters
    ----------
    interval_s: between two lines of one kind, by the records' own time.
    """

    def __init__(self, interval_s: float = _INTERVAL_S) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._lock = threading.Lock()
        #: kind -> (when the last one passed, how many were held back since)
        self._kinds: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written; one that stands for others says so."""
        if not any(record.name == name or record.name.startswith(name + ".") for name in _LOGGERS):
            return True
        kind = (record.name, record.levelno, self._text(record))
        with self._lock:
            passed, held_back = self._kinds.get(kind, (-math.inf, 0))
            if record.created - passed < self._interval_s:
                self._kinds[kind] = (passed, held_back + 1)
                return False
            self._kinds[kind] = (record.created, 0)
        if held_back:
            record.msg, record.args = f"{record.getMessage()} ({held_back} more like it before)", ()
        return True

    @staticmethod
    def _text(record: logging.LogRecord) -> str:
        # librdkafka's lines are all "%s [%s] %s": what happened, to whom, and the details.
        if record.name == "stream.kafka" and isinstance(record.args, tuple) and record.args:
            return f"{record.msg} {record.args[0]}"
        return str(record.msg)
