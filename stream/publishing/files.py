"""Rows of Parquet, CSV and JSON-lines files, in chunks of bounded size.

Guarantees: rows are numbered from 1 (a CSV file's header and blank lines of JSON are no rows) and come in the file's
order; a row that cannot be read is told apart from the file that cannot; memory does not grow with the file (of a
Parquet file, a row group's pages are read as they are needed).
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from stream.errors import DataError, RecordError
from stream.wire.formats import read_map
from stream.wire.reasons import TOO_LARGE, UNDECODABLE

__all__ = ["FILE_FORMATS", "Chunk", "FileFormat", "RowFile"]

FileFormat = Literal["parquet", "csv", "jsonl"]
FILE_FORMATS: Final[tuple[str, ...]] = get_args(FileFormat)
_ENDINGS: Final[dict[str, FileFormat]] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
STDIN: Final = "-"
_CELL_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """n consecutive rows.

    first: number of the first row, from 1. columns: values by column name, n each, None where a row has none.
    maps: JSON lines only: the rows as they were read. moments: columns that hold UTC milliseconds, since the file says
        that they are moments. bad: rows that cannot be read, by index; their values are None.
    """

    first: int
    n: int
    columns: Mapping[str, Sequence[Any]]
    maps: list[dict[str, Any]] | None = None
    moments: frozenset[str] = frozenset()
    bad: dict[int, RecordError] = field(default_factory=dict)


class RowFile:
    """One file, open for one reading.

    Parameters
    ----------
    path: `-` is standard input, which has to be JSON lines.
    written_as: by the path's ending if not given.
    delimiter: of a CSV file.
    line_bytes: longest line of JSON.

    `names` are its columns; None for JSON lines, whose rows each have their own. `rows` is how many there are, None
    where only reading would tell. `typed` is whether numbers and times are more than text.

    Raises
    ------
    DataError: the file cannot be read, or is not what it should be.
    """

    def __init__(
        self, path: str, written_as: str | None = None, *, delimiter: str | None = None, line_bytes: int = 1 << 20
    ) -> None:
        self.path = path
        self.shown = "standard input" if path == STDIN else repr(path)
        self.written_as = written_as or _format_of(path)
        self._delimiter = delimiter or ("\t" if path.endswith(".tsv") else ",")
        self._line_bytes = line_bytes
        self.typed = self.written_as != "csv"
        self.names: list[str] | None = None
        self.rows: int | None = None
        self._parquet: pq.ParquetFile | None = None
        self._lines: BinaryIO | None = None
        if path == STDIN and self.written_as != "jsonl":
            raise DataError(f"standard input can only be JSON lines, not {self.written_as}: name a file")
        try:
            self._open()
        except (OSError, pa.ArrowException, csv.Error) as error:
            self.close()
            raise self._unreadable(error) from error
        except BaseException:
            self.close()
            raise

    def chunks(self, size: int, from_row: int = 1) -> Iterator[Chunk]:
        """The rows from `from_row` on, at most `size` at a time.

        Raises
        ------
        DataError: the file cannot be read on; names the row.
        """
        if self.written_as == "parquet":
            return self._parquet_chunks(size, from_row)
        return self._csv_chunks(size, from_row) if self.written_as == "csv" else self._json_chunks(size, from_row)

    def share(self, row: int) -> float | None:
        """How much of the file has been read up to a row, 0 to 1; None where nobody knows."""
        if self.rows is not None:
            return row / max(1, self.rows)
        if self._lines is None or self.path == STDIN:
            return None
        size = Path(self.path).stat().st_size
        return self._lines.tell() / size if size else 1.0

    def close(self) -> None:
        """Let go of the file."""
        if self._parquet is not None:
            self._parquet.close()
        if self._lines is not None and self.path != STDIN:
            self._lines.close()

    def _unreadable(self, error: Exception, row: int | None = None) -> DataError:
        where = "" if row is None else f" after row {row - 1}"
        return DataError(f"{self.shown} cannot be read as {self.written_as}{where}: {error}")

    def _parquet_chunks(self, size: int, from_row: int) -> Iterator[Chunk]:
        assert self._parquet is not None
        metadata = self._parquet.metadata
        row, group = 1, 0
        while group < metadata.num_row_groups and row + metadata.row_group(group).num_rows <= from_row:
            row += metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, metadata.num_row_groups))
        moments = frozenset(one.name for one in self._parquet.schema_arrow if _is_moment(one.type))
        try:
            for batch in self._parquet.iter_batches(size, row_groups=groups) if groups else ():
                skipped = min(max(0, from_row - row), batch.num_rows)
                kept = batch.slice(skipped)
                if kept.num_rows:
                    columns = {name: _values(kept.column(i)) for i, name in enumerate(kept.schema.names)}
                    yield Chunk(row + skipped, kept.num_rows, columns, moments=moments)
                row += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error, row) from error

    def _open(self) -> None:
        if self.written_as == "parquet":
            self._parquet = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
            self.names = list(self._parquet.schema_arrow.names)
            self.rows = self._parquet.metadata.num_rows
            return
        self._lines = sys.stdin.buffer if self.path == STDIN else Path(self.path).open("rb")  # noqa: SIM115
        if self.written_as != "csv":
            return
        if len(self._delimiter) != 1:
            raise DataError(f"--delimiter {self._delimiter!r}: expected one character")
        # What is no UTF-8 is kept as it is until its row is looked at, so that one byte does not end a file.
        text = (line.decode("utf-8", "surrogateescape") for line in self._bounded_lines(self._lines))
        csv.field_size_limit(_CELL_BYTES)
        self._reader = csv.reader(text, delimiter=self._delimiter, strict=True)
        header = next(self._reader, None)
        if not header:
            raise DataError(f"{self.shown} is empty: expected a line of column names")
        header[0] = header[0].removeprefix("\ufeff")
        twice = {name for name in header if header.count(name) > 1}
        if twice:
            raise DataError(f"{self.shown} has columns of one name: {', '.join(sorted(twice))}; rename them")
        self.names = header

    def _bounded_lines(self, file: BinaryIO) -> Iterator[bytes]:
        # A longer line would come in two parts, and be two rows.
        while line := file.readline(_CELL_BYTES):
            if len(line) == _CELL_BYTES and not line.endswith(b"\n"):
                raise csv.Error(f"a line has more than {_CELL_BYTES} bytes")
            yield line

    def _csv_chunks(self, size: int, from_row: int) -> Iterator[Chunk]:
        row, taken = 1, list[list[str]]()
        try:
            for cells in self._reader:
                if not cells:
                    continue
                if row >= from_row:
                    taken.append(cells)
                row += 1
                if len(taken) == size:
                    yield self._of_cells(row - size, taken)
                    taken = []
        except (OSError, csv.Error) as error:
            if taken:
                yield self._of_cells(row - len(taken), taken)
            raise self._unreadable(error, row) from error
        if taken:
            yield self._of_cells(row - len(taken), taken)

    def _of_cells(self, first: int, rows: list[list[str]]) -> Chunk:
        assert self.names is not None
        width = len(self.names)
        bad: dict[int, RecordError] = {}
        for i, cells in enumerate(rows):
            if len(cells) != width:
                bad[i] = RecordError(UNDECODABLE, f"{len(cells)} cells: expected {width}, as the header has")
                rows[i] = [""] * width
        by_column = zip(self.names, zip(*rows, strict=True), strict=True)
        columns = {name: [cell or None for cell in cells] for name, cells in by_column}
        return Chunk(first, len(rows), columns, bad=bad)

    def _json_chunks(self, size: int, from_row: int) -> Iterator[Chunk]:
        assert self._lines is not None
        row = 1
        # One byte more, the line's end apart, tells a line that is too long; its rest is skipped.
        limit = self._line_bytes + 1
        maps: list[dict[str, Any]] = []
        bad: dict[int, RecordError] = {}
        try:
            while line := self._lines.readline(limit + 1):
                if len(line) > limit:
                    while line and not line.endswith(b"\n"):
                        line = self._lines.readline(_CELL_BYTES)
                    problem: RecordError | None = RecordError(
                        TOO_LARGE, f"the line has more bytes than limits.record_bytes = {self._line_bytes}"
                    )
                else:
                    line = line.strip()
                    if not line:
                        continue
                    problem = None
                row += 1
                if row <= from_row:
                    continue
                content: dict[str, Any] = {}
                if problem is None:
                    try:
                        content = read_map(line, "json", self._line_bytes)
                    except RecordError as error:
                        problem = error
                if problem is not None:
                    bad[len(maps)] = problem
                maps.append(content)
                if len(maps) == size:
                    yield _of_maps(row - len(maps), maps, bad)
                    maps, bad = [], {}
            if maps:
                yield _of_maps(row - len(maps), maps, bad)
        except OSError as error:
            raise self._unreadable(error, row) from error


def _of_maps(first: int, maps: list[dict[str, Any]], bad: dict[int, RecordError]) -> Chunk:
    names = dict.fromkeys(itertools.chain.from_iterable(maps))
    columns = {name: [one.get(name) for one in maps] for name in names}
    return Chunk(first, len(maps), columns, maps, bad=bad)


def _values(column: pa.Array) -> list[Any]:
    """Python's values; moments as integers, UTC milliseconds, those without a time zone taken as UTC."""
    if _is_moment(column.type):
        if pa.types.is_date(column.type):
            column = column.cast(pa.timestamp("ms"))
        milliseconds = pa.timestamp("ms", column.type.tz)
        column = column.cast(milliseconds, safe=False).cast(pa.int64())
    elif pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    values: list[Any] = column.to_pylist()
    return values


def _is_moment(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _format_of(path: str) -> FileFormat:
    if path == STDIN:
        return "jsonl"
    found = _ENDINGS.get(Path(path).suffix.lower())
    if found is None:
        raise DataError(f"{path!r}: its name does not tell what it is; say --format {'|'.join(FILE_FORMATS)}")
    return found
