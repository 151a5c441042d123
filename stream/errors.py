"""Every error that Livestate raises on purpose, in one tree.

    LivestateError
    ├── SettingsError        a setting is wrong: name, value, what would do
    ├── BrokerError          the broker cannot be reached, or refuses
    │   ├── SecurityError    broker and client do not trust each other; what to check
    │   ├── TopicError       a topic is missing or has the wrong shape
    │   └── Fenced           another process took over this role; this one must stop
    ├── RecordError          one record from a topic is unusable; it belongs in dead-letters
    ├── StoreError           the embedding store cannot go on; names the path and what to do
    ├── ParametersError      a parameter version is torn, missing or of another shape
    ├── DataError            a file or data set given by the user cannot be used
    └── UnknownClientError   the client asked for has no row

A program that sees a `LivestateError` prints its text and exits with `exit_code`; any other exception is a
defect of ours and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "BrokerError",
    "DataError",
    "Fenced",
    "LivestateError",
    "ParametersError",
    "RecordError",
    "SecurityError",
    "SettingsError",
    "StoreError",
    "TopicError",
    "UnknownClientError",
]


class LivestateError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class SettingsError(LivestateError):
    """A setting is missing, unknown, of the wrong type or out of range."""

    exit_code = 2


class BrokerError(LivestateError):
    """The broker cannot be reached, or refuses a request."""

    exit_code = 3


class SecurityError(BrokerError):
    """The broker does not let this client in, or the client does not trust the broker; waiting is of no use."""


class TopicError(BrokerError):
    """A topic is missing or has another number of partitions than the settings say."""


class Fenced(BrokerError):
    """Another process took over this role; going on would write over its work."""

    exit_code = 4


class RecordError(LivestateError):
    """One record is unusable.

    `reason` is one of a closed set of words (a metric label, a header); the message names the field, the value
    and what would be accepted.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StoreError(LivestateError):
    """The embedding store cannot go on; the message names the path and what to do."""

    exit_code = 5


class ParametersError(LivestateError):
    """A parameter version is torn, missing or of another shape than the settings describe."""

    exit_code = 6


class DataError(LivestateError):
    """A file or data set given by the user cannot be used."""

    exit_code = 7


class UnknownClientError(LivestateError):
    """The client asked for has no row: never seen, not admitted yet, or expired."""

    exit_code = 8
