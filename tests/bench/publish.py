"""How fast `livestate publish` reads, checks and sends the rows of a file.

    python -m tests.bench.publish [--rows N] [--broker apache|embedded]

The same payments as Parquet, CSV and JSON lines, published by a process of its own each time, as a user would; the
figures count rows for each second from the first row read to the last one confirmed, and for each second of the
process's processor time after its kernels are compiled, which leaves out what neighbours take. `peak_bytes` is the most
memory that the process held. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from stream.broker import ApacheBroker, Broker, EmbeddedBroker
from stream.kafka import ensure_topics
from stream.settings import parse
from tests.bench.support.site import machine
from tests.support.brokers import apache_home
from tests.support.processes import ROOT

__all__ = ["main"]

SETTINGS = """
[modalities.payment.fields]
amount = { type = "number" }
merchant = { type = "category", embedding = 8 }
kind = { type = "category", values = ["card", "transfer"] }
"""
_GROUP_ROWS = 500_000


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; prints and returns the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.publish")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--broker", choices=["apache", "embedded"])
    options = parser.parse_args(arguments)
    home = apache_home() if options.broker != "embedded" else None
    if options.broker == "apache" and home is None:
        parser.error("--broker apache: set KAFKA_HOME to a distribution and install Java 17")
    result: dict[str, Any] = {"bench": "publish", **machine(), "rows": options.rows}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        broker: Broker = (
            EmbeddedBroker(directory / "broker") if home is None else ApacheBroker(home, directory / "broker")
        )
        with broker:
            result["broker"] = broker.name
            # By a process of its own: a process counts as its own peak what the one that started it held.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                files = pool.apply(_files, (directory, options.rows))
            (directory / "bank.toml").write_text(SETTINGS)
            ensure_topics(parse(SETTINGS, broker.environment), create=True)
            one = directory / "one.csv"
            one.write_text("client_id,timestamp_ms,amount,merchant,kind\n1,1600000000000,1,1,card\n")
            # Compiled and cached before anything is timed; start and end of the program are not what is measured.
            _publish(directory, one, broker)
            _, idle_s, _ = _publish(directory, one, broker)
            for written_as, file in files.items():
                done, seconds, peak = _publish(directory, file, broker)
                result[f"{written_as}_rows_per_s"] = done["rows_per_second"]
                result[f"{written_as}_rows_per_cpu_s"] = round(done["sent"] / max(seconds - idle_s, 1e-9))
                result[f"{written_as}_peak_bytes"] = peak
                file.unlink()
    print(json.dumps(result))
    return result


def _files(directory: Path, rows: int) -> dict[str, Path]:
    rng = np.random.default_rng(1)
    files = {ending: directory / f"payments.{ending}" for ending in ("parquet", "csv", "jsonl")}
    parquet = text = None
    with files["jsonl"].open("w") as lines:
        for start in range(0, rows, _GROUP_ROWS):
            n = min(_GROUP_ROWS, rows - start)
            times = 1_600_000_000_000 + 100 * np.arange(start, start + n)
            table = pa.table(
                {
                    "client_id": pa.array(rng.integers(0, 100_000, n)).cast(pa.string()),
                    "timestamp_ms": pa.array(times),
                    "amount": pa.array(np.round(rng.lognormal(3.0, 1.0, n), 2)),
                    "merchant": pa.array(rng.integers(0, 5_000, n)).cast(pa.string()),
                    "kind": pa.array(rng.choice(["card", "transfer"], n)),
                }
            )
            parquet = parquet or pq.ParquetWriter(files["parquet"], table.schema)
            parquet.write_table(table)
            text = text or pa_csv.CSVWriter(files["csv"], table.schema)
            text.write_table(table)
            lines.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    for writer in (parquet, text):
        assert writer is not None
        writer.close()
    return files


def _publish(directory: Path, file: Path, broker: Broker) -> tuple[dict[str, Any], float, int]:
    """What the command says, its processor seconds, and its peak memory."""
    command = ["publish", str(file), "--settings", str(directory / "bank.toml"), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **broker.environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "stream.cli", *command], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    assert process.returncode == 0
    return json.loads(text), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


if __name__ == "__main__":
    main()
