"""What becomes of a row: a column for each member of a record, by name or by what the user says.

Guarantees: a column that is not asked for changes nothing; no value is guessed: text becomes a number or a moment
only where the target is one, an empty cell leaves its field out, and what does not fit is left for the decoder to
refuse, or refused here with its column's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, get_args

from stream.errors import DataError, RecordError, SettingsError
from stream.publishing.files import Chunk, RowFile
from stream.settings import Settings
from stream.wire import Schema
from stream.wire.reasons import OUT_OF_RANGE, WRONG_TYPE, refusal

__all__ = ["RowMapping", "Times"]

Times = Literal["auto", "iso", "s", "ms"]
TIMES: Final[tuple[str, ...]] = get_args(Times)

_EVENT: Final = ("client_id", "timestamp_ms", "modality", "event_id")
_FEEDBACK: Final = ("client_id", "timestamp_ms", "as_of_ms", "task", "label", "weight", "window_end_ms")
_NEEDED: Final = {
    "events": ("client_id", "timestamp_ms"),
    "feedback": ("client_id", "timestamp_ms", "as_of_ms", "label"),
}
_MOMENTS: Final = frozenset({"timestamp_ms", "as_of_ms", "window_end_ms"})
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
#: As milliseconds early in 1973, as seconds in the year 5138: no number below it says which of the two it is.
_AMBIGUOUS: Final = 100_000_000_000
_TRUTH: Final = {"true": True, "false": False}

#: A record as a map, or why there is none.
Record = dict[str, Any] | RecordError


class RowMapping:
    """How rows of one file become records.

    Parameters
    ----------
    kind: `events` or `feedback`.
    columns: target to column. Targets are the record's members, and for events the names of fields, as `amount` or
        `fields.amount`; targets not given take the column of their name, where there is one.
    constant: the modality of every event, or the task of all feedback; taken from the settings where there is but one.
    times: what moments are: `iso` text, epoch seconds `s` or milliseconds `ms`. `auto` tells text from numbers, takes
        numbers as milliseconds and refuses those that might be seconds.

    Raises
    ------
    SettingsError: a target, the modality or the task is unknown.
    DataError: the file lacks a column.
    """

    def __init__(
        self, settings: Settings, kind: str, file: RowFile, columns: dict[str, str], constant: str | None, times: str
    ) -> None:
        self._kind = kind
        self._file = file
        self._times = times
        self._schema = Schema.compile(settings)
        #: Tasks whose labels are text.
        self._named = {name for name, task in settings.tasks.items() if task.kind == "multiclass"}
        self._members = _EVENT if kind == "events" else _FEEDBACK
        self._chosen = "modality" if kind == "events" else "task"
        known: Collection[str] = self._schema.by_name if kind == "events" else settings.tasks
        if constant is not None and constant not in known:
            raise SettingsError(f"--{self._chosen} {constant!r}: expected one of {', '.join(known)}")
        self._columns = self._targets(columns)
        #: Whether a line of JSON with the record's own members is the record.
        self._as_is = not columns and constant is None and times == "auto"
        #: Said by the first rows.
        self._are_records: bool | None = None
        names = file.names
        if constant is None and len(known) == 1 and (names is None or self._column(self._chosen) not in names):
            (constant,) = known
        self._constant = constant
        if names is not None:
            self._check(names)

    def records(self, chunk: Chunk) -> list[Record]:
        """One for each row of the chunk."""
        errors = dict(chunk.bad)
        if self._are_records is None:
            self._are_records = chunk.maps is not None and self._as_is and self._is_record(chunk)
        if self._are_records and chunk.maps is not None:
            records: list[Record] = list(chunk.maps)
        else:
            members = {m: self._values(chunk, m, errors) for m in self._members if m != self._chosen}
            chosen = (
                [self._constant] * chunk.n if self._constant is not None else self._values(chunk, self._chosen, errors)
            )
            members[self._chosen] = chosen
            if self._kind == "feedback" and not self._file.typed:
                members["label"] = self._labels(chunk, chosen, errors)
            if self._kind == "events":
                # Last, so that a reader in one pass knows the modality before its fields.
                members["fields"] = self._fields(chunk, chosen, errors)
            records = list(_maps(chunk.n, members))
        for index, error in errors.items():
            records[index] = error
        return records

    def unused(self) -> list[str]:
        """Columns that nothing takes; none where every row has its own."""
        used = set(self._columns.values()) | set(self._members)
        if self._kind == "events":
            used |= {
                name
                for modality in self._schema.modalities
                if self._constant in (None, modality.name)
                for name in modality.fields
            }
        return [name for name in self._file.names or () if name not in used]

    def _targets(self, columns: dict[str, str]) -> dict[str, str]:
        fields = {name for m in self._schema.modalities for name in m.fields} if self._kind == "events" else set()
        targets: dict[str, str] = {}
        for target, column in columns.items():
            plain = target.removeprefix("fields.")
            if plain == target and target in self._members:
                targets[target] = column
            elif plain in fields:
                targets[f"fields.{plain}"] = column
            else:
                accepted = [*self._members, *sorted(fields)]
                raise SettingsError(f"--map {target}={column}: expected a target among {', '.join(accepted)}")
        return targets

    def _column(self, target: str) -> str:
        return self._columns.get(target, target.removeprefix("fields."))

    def _check(self, names: Sequence[str]) -> None:
        """Every row has what it needs; rows of JSON each have columns of their own, and the decoder sees to it."""
        needed = [*_NEEDED[self._kind], *([] if self._constant is not None else [self._chosen])]
        if self._kind == "events" and self._constant is not None:
            needed += [f"fields.{name}" for name in self._schema.by_name[self._constant].required]
        for target in [*self._columns, *needed]:
            if self._column(target) in names:
                continue
            plain = target.removeprefix("fields.")
            hint = ""
            if target not in self._columns:
                hint = f"; say --map {plain}=COLUMN" + (f", or --{plain} NAME" if target == self._chosen else "")
            raise DataError(
                f"{self._file.shown} has no column {self._column(target)!r} for {plain}, only {', '.join(names)}{hint}"
            )

    def _is_record(self, chunk: Chunk) -> bool:
        return self._kind == "feedback" or "fields" in chunk.columns

    def _values(self, chunk: Chunk, target: str, errors: dict[int, RecordError], number: bool = False) -> list[Any]:
        """A target's values, n of them, as the record holds them."""
        column = self._column(target)
        values = chunk.columns.get(column)
        if values is None:
            return [None] * chunk.n
        if target in _MOMENTS:
            if column in chunk.moments:
                return list(values)
            return _each(values, lambda value: _moment(column, value, self._times), errors)
        if (number or target == "weight") and not self._file.typed:
            return _each(values, lambda value: _number(column, value), errors)
        if target in ("client_id", "event_id") and not all(isinstance(value, str) for value in values):
            return _each(values, _plain, errors)
        return list(values)

    def _labels(self, chunk: Chunk, chosen: Sequence[Any], errors: dict[int, RecordError]) -> list[Any]:
        """Labels written as text: numbers or true and false, but for tasks whose labels are names of classes."""
        values = self._values(chunk, "label", errors)
        column = self._column("label")
        for i, (value, task) in enumerate(zip(values, chosen, strict=True)):
            if value is None or (isinstance(task, str) and task in self._named):
                continue
            try:
                values[i] = _TRUTH[value.lower()] if value.lower() in _TRUTH else _number(column, value)
            except RecordError as error:
                errors.setdefault(i, error)
        return values

    def _fields(self, chunk: Chunk, chosen: Sequence[Any], errors: dict[int, RecordError]) -> list[Any]:
        out: list[Any] = [{}] * chunk.n
        for name in dict.fromkeys(one for one in chosen if isinstance(one, str)):
            modality = self._schema.by_name.get(name)
            if modality is None:
                continue
            # What is wrong in a row of another modality is no business of this one.
            own: dict[int, RecordError] = {}
            rows = _maps(
                chunk.n,
                {
                    field.name: self._values(chunk, f"fields.{field.name}", own, number=field.type == "number")
                    for field in modality.fields.values()
                    if self._column(f"fields.{field.name}") in chunk.columns
                },
            )
            for i, one in enumerate(chosen):
                if one == name:
                    out[i] = rows[i]
                    if i in own:
                        errors.setdefault(i, own[i])
        return out


def _maps(n: int, members: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """n maps of the values that are there."""
    columns = {name: values for name, values in members.items() if any(value is not None for value in values)}
    if not columns:
        return [{} for _ in range(n)]
    names = list(columns)
    if not any(None in values for values in columns.values()):
        return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [
        {name: value for name, value in zip(names, row, strict=True) if value is not None}
        for row in zip(*columns.values(), strict=True)
    ]


def _each(values: Sequence[Any], convert: Callable[[Any], Any], errors: dict[int, RecordError]) -> list[Any]:
    """Converted values; where that fails the reason is noted, and there is none."""
    out: list[Any] = []
    for i, value in enumerate(values):
        try:
            out.append(None if value is None else convert(value))
        except RecordError as error:
            errors.setdefault(i, error)
            out.append(None)
    return out


def _plain(value: Any) -> Any:
    """Ids are text; tables often hold them as integers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _number(column: str, text: str) -> float | int:
    try:
        # Python takes 1_000 for a number, which others write otherwise.
        if "_" not in text:
            return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        pass
    raise refusal(WRONG_TYPE, f"column {column}", text, "a number")


def _moment(column: str, value: Any, times: str) -> Any:
    """UTC milliseconds."""
    name = f"column {column}"
    if isinstance(value, str):
        if times in ("auto", "iso"):
            try:
                when = datetime.fromisoformat(value)
            except ValueError:
                if times == "iso":
                    raise refusal(WRONG_TYPE, name, value, "a moment such as 2026-01-31T08:15:00Z") from None
            else:
                # Without an offset of its own it is UTC. Eight digits are a day to Python, a number to most others.
                if not value.isdigit():
                    when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
                    return (when - _EPOCH) // _MILLISECOND
        try:
            value = int(value)
        except ValueError:
            value = _finite(name, value)
    elif times == "iso" and isinstance(value, int | float):
        raise refusal(WRONG_TYPE, name, value, "text such as 2026-01-31T08:15:00Z, as --times iso says")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refusal(WRONG_TYPE, name, value, "a moment: ISO 8601 text, epoch seconds or epoch milliseconds")
    if not math.isfinite(value):
        raise refusal(OUT_OF_RANGE, name, value, "a finite number")
    if times == "s":
        return round(value * 1000)
    if times == "auto" and abs(value) < _AMBIGUOUS:
        raise refusal(OUT_OF_RANGE, name, value, "no doubt: say --times s or --times ms")
    return round(value)


def _finite(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise refusal(WRONG_TYPE, name, text, "a moment: ISO 8601 text, epoch seconds or epoch milliseconds") from None
