"""`livestate publish`: what a file says is on the topic, once, in order; what is wrong is named by file and row."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import msgpack
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream.partitioner import partition_of
from stream.publishing import RowFile, RowMapping
from stream.publishing.sender import Checker
from stream.settings import load
from tests.commands.conftest import Run
from tests.support.processes import ROOT, wait_for
from tests.support.settings import write_settings
from tests.support.truth import read_topic
from tests.worker.conftest import System

T0 = 1_700_000_000_000
CSV = """customer,ts,value,merchant,colour
900,2023-11-14T22:13:20Z,3.5,fuel,red
901,2023-11-14T22:13:21+00:00,-2,"bakery, new",blue
902,2023-11-14T22:13:22,1e2,,green
"""
MAP = "client_id=customer,timestamp_ms=ts,amount=value"


def events_on(system: System, topic: str = "events") -> list[dict[str, object]]:
    """Every record of a topic, each on its client's partition; partition by partition."""
    found = []
    for partition in range(2):
        for message in read_topic(system.settings, getattr(system.settings.topics, topic), partition):
            record = msgpack.unpackb(message.value())
            assert partition_of(message.key(), 2) == partition
            assert record["client_id"].encode() == message.key()
            found.append(record)
    return sorted(found, key=lambda record: (record["timestamp_ms"], record["client_id"]))


def payments(n: int) -> pa.Table:
    """n payments of a few clients, a second apart."""
    return pa.table(
        {
            "customer": pa.array([i % 7 for i in range(n)]),
            "ts": pa.array([T0 + 1000 * i for i in range(n)]).cast(pa.timestamp("ms")),
            "value": pa.array([float(i) for i in range(n)]),
            "merchant": pa.array(["fuel"] * n),
        }
    )


def test_a_csv_file_is_mapped_and_published(system: System, tmp_path: Path, run: Run) -> None:
    # Given a table whose columns are called otherwise
    file = tmp_path / "pay.csv"
    file.write_bytes(
        b"\xef\xbb\xbf" + CSV.replace("902,2023-11-14T22:13:22,1e2,,", "902,2023-11-14T22:13:22,1e2,x,").encode()
    )
    # When it is published
    done = run("publish", file, "--settings", system.file, "--modality", "pay", "--map", MAP, "--json")
    # Then all of it is there, and a column that nothing takes is named
    assert done.code == 0, done.err
    assert (done.json["rows"], done.json["sent"], done.json["go_on_with"]) == (3, 3, None)
    assert "columns that nothing takes: colour" in done.err
    pay = [("900", 3.5, "fuel"), ("901", -2, "bakery, new"), ("902", 100.0, "x")]
    assert events_on(system) == [
        {"client_id": c, "timestamp_ms": T0 + 1000 * i, "modality": "pay", "fields": {"amount": a, "merchant": m}}
        for i, (c, a, m) in enumerate(pay)
    ]


def test_a_parquet_file_goes_on_where_it_was_stopped(embedded_system: System, tmp_path: Path, run: Run) -> None:
    # Given a file of many row groups, one row of which is bad
    system, n, bad = embedded_system, 5_000, 3_210
    table = payments(n)
    values = table.column("value").to_pylist()
    values[bad - 1] = 2e6
    file, mended = tmp_path / "pay.parquet", tmp_path / "mended.parquet"
    pq.write_table(table.set_column(2, "value", pa.array(values)), file, row_group_size=700)
    pq.write_table(table, mended, row_group_size=700)
    arguments = ("--settings", system.file, "--modality", "pay", "--map", MAP)
    # When it is published
    done = run("publish", file, *arguments, "--json")
    # Then it ends at that row, with the reason
    assert done.code == 7
    assert f"{str(file)!r} row {bad}: out_of_range: fields.amount = 2000000.0: expected a number from" in done.err
    assert done.json["go_on_with"] == {"file": str(file), "from_row": bad}
    assert f"go on with --from-row {bad}" in done.err
    assert len(events_on(system)) == bad - 1
    # When it goes on from there with the mended file
    done = run("publish", mended, *arguments, "--from-row", bad, "--json")
    # Then each row is there once
    assert (done.code, done.json["sent"]) == (0, n - bad + 1)
    assert [e["fields"]["amount"] for e in events_on(system)] == [float(i) for i in range(n)]


def test_bad_rows_are_skipped_and_counted(embedded_system: System, tmp_path: Path, run: Run) -> None:
    system = embedded_system
    good = {"client_id": "a", "timestamp_ms": T0, "modality": "pay", "fields": {"amount": 1, "merchant": "fuel"}}
    lines = [
        json.dumps(good),
        "",
        json.dumps(good | {"modality": "visit"}),
        "{",
        json.dumps(good | {"client_id": 900}),
        '{"client_id": "a", "client_id": "b"}',
        json.dumps(good | {"timestamp_ms": 2 * T0}),
        json.dumps(good | {"event_id": "x" * 2_000_000}),
        json.dumps(good | {"client_id": "\ud800"}),
        "[1]",
        json.dumps(good | {"timestamp_ms": T0 + 1, "fields": {"amount": 1, "merchant": 1 << 70}}),
        json.dumps(good | {"timestamp_ms": T0 + 2}),
    ]
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join(lines) + "\n")
    done = run("publish", file, "--settings", system.file, "--skip-bad", "--json")
    assert done.code == 0, done.err
    assert done.json["rows"] == 11
    assert done.json["bad"] == {
        "unknown_modality": 1, "undecodable": 1, "wrong_type": 1, "duplicate_field": 1, "future": 1, "too_large": 1,
        "invalid_utf8": 1, "not_a_map": 1, "out_of_range": 1,
    }  # fmt: skip
    # Blank lines are no rows
    assert "row 2: unknown_modality" in done.err
    assert "row 10: out_of_range" in done.err
    assert [event["timestamp_ms"] for event in events_on(system)] == [T0, T0 + 2]


def test_feedback_is_read_from_standard_input(
    embedded_system: System, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given labels one a line, their moments in seconds
    system = embedded_system
    lines = [
        {"client_id": 7, "timestamp_ms": T0 // 1000 + 60, "as_of_ms": T0 // 1000 + 0.5, "label": i % 2}
        for i in range(4)
    ]
    text = io.TextIOWrapper(io.BytesIO("\n".join(map(json.dumps, lines)).encode()))
    monkeypatch.setattr(sys, "stdin", text)
    # When they are published as answers to the only task
    done = run("publish", "-", "--feedback", "--settings", system.file, "--times", "s")
    # Then they are what the trainer reads
    assert done.code == 0, done.err
    assert events_on(system, "feedback") == [
        {"client_id": "7", "timestamp_ms": T0 + 60_000, "as_of_ms": T0 + 500, "task": "accepted", "label": i % 2}
        for i in range(4)
    ]


def test_labels_written_as_text_are_what_their_task_takes(tmp_path: Path) -> None:
    # Given a task of each kind, and their labels in one file
    tasks = """
[tasks.kind_of]
on = "offer"
kind = "multiclass"
classes = ["1", "true"]
[tasks.amount_of]
on = "offer"
kind = "regression"
"""
    settings = load(write_settings(tmp_path / "settings.toml", tasks))
    given = [("accepted", "TRUE"), ("accepted", "0"), ("kind_of", "1"), ("kind_of", "true"), ("amount_of", "-2.5")]
    lines = [f"a,{T0 + 1},{T0},{task},{label}" for task, label in [*given, ("accepted", "perhaps")]]
    (tmp_path / "labels.csv").write_text("\n".join(["client_id,timestamp_ms,as_of_ms,task,label", *lines]))
    # When they are read
    source = RowFile(str(tmp_path / "labels.csv"))
    (chunk,) = source.chunks(10)
    *records, bad = RowMapping(settings, "feedback", source, {}, None, "auto").records(chunk)
    source.close()
    # Then each is what its task takes, and what is none is named
    assert [record["label"] for record in records] == [True, 0, "1", "true", -2.5]
    assert "column label = 'perhaps'" in str(bad)
    assert not Checker(settings, "feedback").check(records, T0).errors


@pytest.mark.parametrize(
    ("written", "times", "expected"),
    [
        ("2023-11-14T22:13:20.5Z", "auto", T0 + 500),
        ("2023-11-15T00:13:20+02:00", "iso", T0),
        ("1700000000", "s", T0),
        ("1700000000.25", "s", T0 + 250),
        ("1700000000000", "auto", T0),
        ("20231114", "ms", 20_231_114),
        ("1700000000", "auto", "say --times s or --times ms"),
        ("20231114", "auto", "say --times s or --times ms"),
        ("yesterday", "auto", "expected a moment"),
        ("1700000000000", "iso", None),
        ("inf", "s", "expected a finite number"),
    ],
)
def test_moments_are_read_as_they_are_written(
    tmp_path: Path, run: Run, written: str, times: str, expected: int | str | None
) -> None:
    file = tmp_path / "pay.csv"
    file.write_text(f"client_id,timestamp_ms,amount,merchant\na,{written},1,x\n")
    settings = write_settings(tmp_path / "settings.toml")
    done = run("publish", file, "--settings", settings, "--modality", "pay", "--times", times, "--check")
    if isinstance(expected, int):
        assert done.code == 0, done.err
        source = RowFile(str(file))
        (chunk,) = source.chunks(10)
        (record,) = RowMapping(load(settings), "events", source, {}, "pay", times).records(chunk)
        source.close()
        assert record["timestamp_ms"] == expected
    else:
        assert done.code == 7
        assert "row 1: " in done.err
        assert (expected or "expected a moment such as") in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--map", "amount"], 2, "--map 'amount': expected TARGET=COLUMN"),
        (["--map", "amout=value"], 2, "--map amout=value: expected a target among client_id"),
        (["--map", "amount=price"], 7, "has no column 'price' for amount, only customer, ts, value"),
        (["--modality", "visit"], 2, "--modality 'visit': expected one of pay, offer"),
        (["--modality", "pay"], 7, "has no column 'client_id' for client_id, only customer"),
        (["--map", MAP], 7, "has no column 'modality' for modality"),
        (["--task", "accepted"], 2, "--task 'accepted': events have none"),
        (["--rate", "0"], 2, "--rate 0: expected a number above 0"),
        (["--from-row", "0"], 2, "--from-row 0: expected 1 or more"),
        (["--format", "parquet"], 7, "cannot be read as parquet"),
        (["--delimiter", ";;"], 7, "--delimiter ';;': expected one character"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(
    tmp_path: Path, run: Run, arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "pay.csv").write_text(CSV)
    settings = write_settings(tmp_path / "settings.toml")
    done = run("publish", tmp_path / "pay.csv", "--settings", settings, *arguments, "--check")
    assert done.code == code
    assert said in done.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"a,a\n1,2\n", "columns of one name: a"),
        (CSV.encode() + b"900,2023-11-14T22:13:20Z\n", "row 4: undecodable: 2 cells: expected 5"),
        (CSV.encode() + b'900,"2023\n', "after row 3"),
        (CSV.encode() + b"\xff,2023-11-14T22:13:20Z,1,x,\n", "row 4: invalid_utf8"),
        (CSV.encode() + b"904,2023-11-14T22:13:20Z,1_0,x,\n", "row 4: wrong_type: column value = '1_0'"),
        (CSV.encode() + b"904,2023-11-14T22:13:20Z,,x,\n", "row 4: missing_field: fields.amount is missing"),
    ],
)
def test_a_broken_csv_file_is_named_by_row(tmp_path: Path, run: Run, content: bytes, said: str) -> None:
    file = tmp_path / "pay.csv"
    file.write_bytes(content.replace(b"1e2,,", b"1e2,x,"))
    settings = write_settings(tmp_path / "settings.toml")
    done = run("publish", file, "--settings", settings, "--modality", "pay", "--map", MAP, "--check")
    assert done.code == 7
    assert said in done.err


def test_moments_that_the_file_itself_tells_are_taken(tmp_path: Path) -> None:
    # Given moments of 1970 in another zone and unit, and a day
    zone = pa.timestamp("ns", "Europe/Paris")
    table = pa.table(
        {
            "a": pa.array([datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)]).cast(zone),
            "b": pa.array([1], pa.int32()).cast(pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    source = RowFile(str(tmp_path / "t.parquet"))
    (chunk,) = source.chunks(5)
    source.close()
    assert dict(chunk.columns) == {"a": [1000], "b": [86_400_000]}
    assert chunk.moments == {"a", "b"}


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_file_is_never_held_whole(tmp_path: Path, ending: str) -> None:
    # Given 60,000 rows, which would be some 15 MB
    n, file = 60_000, tmp_path / f"pay.{ending}"
    if ending == "parquet":
        pq.write_table(payments(n), file, row_group_size=20_000)
    else:
        line = "900,2023-11-14T22:13:20Z,3.5,fuel" if ending == "csv" else '{"client_id": "900", "amount": 3.5}'
        file.write_text("customer,ts,value,merchant\n" + f"{line}\n" * n if ending == "csv" else f"{line}\n" * n)
    # When it is read in chunks, from its middle
    source, rows, last = RowFile(str(file)), 0, 0
    tracemalloc.start()
    for chunk in source.chunks(2_000, n // 3):
        assert last in (0, chunk.first - 1)
        rows, last = rows + chunk.n, chunk.first + chunk.n - 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    source.close()
    # Then every row from there came, and no more than a few chunks were held
    assert (rows, last) == (n - n // 3 + 1, n)
    assert peak < 6_000_000


def test_an_interrupted_publication_says_where_to_go_on(embedded_system: System, tmp_path: Path) -> None:
    # Given a slow publication of very many rows
    system, file = embedded_system, tmp_path / "pay.csv"
    row = "900,2023-11-14T22:13:20Z,3.5,fuel\n"
    file.write_text("customer,ts,value,merchant\n" + row * 100_000)
    command = ["publish", str(file), "--settings", str(system.file), "--modality", "pay", "--map", MAP]
    process = subprocess.Popen(
        [sys.executable, "-m", "stream.cli", *command, "--rate", "2000", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: len(events_on(system)) > 500, 60, "some rows are there")
        # When it is interrupted
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    # Then it says so, and what it names as sent is exactly what is there
    assert process.returncode == 130, err
    assert "Traceback" not in err
    on_topic = len(events_on(system))
    assert json.loads(out)["sent"] == on_topic < 100_000
    assert json.loads(out)["go_on_with"] == {"file": str(file), "from_row": on_topic + 1}
    assert f"go on with --from-row {on_topic + 1}" in err


def test_a_topic_that_is_not_there_is_not_made(embedded_system: System, tmp_path: Path, run: Run) -> None:
    (tmp_path / "pay.csv").write_text(CSV)
    arguments = ("--settings", embedded_system.file, "--modality", "pay", "--map", MAP)
    done = run("publish", tmp_path / "pay.csv", *arguments, "--topic", "no-such-topic")
    assert done.code == 3
    assert "topic 'no-such-topic' is not there" in done.err
