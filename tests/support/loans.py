"""A real stream of loan applications with delayed outcomes: BPI Challenge 2012 (doi 10.4121/uuid:3926db30).

Of each case that ended, the events before its outcome; whether it was approved becomes known with the outcome, which
comes a day to weeks later. The data are read from `../shared/data/bpic2012` beside the checkout, or from the directory
that BPIC2012_HOME names, and are never part of the repository.

What would give the answer away is left out: events at or after the outcome, and in the second before it, are not
published, as automatic completions end a case together with its outcome. Events that may stand for an outcome
(`REVEALING`) are published where they lie before it, as an offer that was withdrawn for a better one does, but are
never asked about. Cases still open at the end are left out.
"""

from __future__ import annotations

import csv
import gzip
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["EVALUATED_FROM_MS", "REVEALING", "Loans", "load_loans", "loans_directory"]

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data" / "bpic2012"

REVEALING = frozenset(
    (
        "A_APPROVED", "A_REGISTERED", "A_ACTIVATED", "A_DECLINED", "A_CANCELLED", "O_ACCEPTED", "O_DECLINED",
        "O_CANCELLED",
    )
)  # fmt: skip
#: 2011-12-15, midnight in Amsterdam.
EVALUATED_FROM_MS = 1_323_903_600_000
_MARGIN_MS = 1_000


@dataclass(frozen=True)
class Loans:
    """The stream, n events in order of time, no two of a case in one millisecond.

    `case`, `activity` (with its lifecycle), `resource` (empty: nobody): of each event; `amount` asked for, `hour` and
    `weekday` on the local clock; `asked` (n,) whether a prediction is made there; `outcome`: DECLINED, APPROVED or
    CANCELLED, and when it became known, `outcome_ms`.
    """

    case: NDArray[np.str_]
    timestamp_ms: NDArray[np.int64]
    activity: NDArray[np.str_]
    resource: NDArray[np.str_]
    amount: NDArray[np.float64]
    hour: NDArray[np.float64]
    weekday: NDArray[np.str_]
    asked: NDArray[np.bool_]
    outcome: NDArray[np.str_]
    outcome_ms: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.case)

    def until(self, cases: int) -> Loans:
        """The first so many cases alone."""
        _, first = np.unique(self.case, return_index=True)
        kept = np.isin(self.case, self.case[np.sort(first)[:cases]])
        return Loans(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


def loans_directory() -> Path | None:
    """Where the data are; None where they are not here."""
    directory = Path(os.environ.get("BPIC2012_HOME") or _BESIDE)
    usable = all((directory / name).is_file() for name in ("events.csv.gz", "cases.csv.gz"))
    return directory if usable else None


def load_loans(directory: Path) -> Loans:
    """Read the stream."""
    with gzip.open(directory / "cases.csv.gz", "rt", encoding="utf-8", newline="") as file:
        cases = {row["case_id"]: row for row in csv.DictReader(file) if row["outcome"] != "OPEN"}
    ends = {case: _ms(datetime.fromisoformat(row["outcome_ts"])) for case, row in cases.items()}
    rows: list[tuple[object, ...]] = []
    times: list[int] = []
    last: dict[str, int] = {}
    with gzip.open(directory / "events.csv.gz", "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            case = row["case_id"]
            if case not in cases:
                continue
            local = datetime.fromisoformat(row["timestamp"])
            at_ms = _ms(local)
            if at_ms > ends[case] - _MARGIN_MS:
                continue
            # Events of one millisecond keep their order.
            at_ms = last[case] = max(at_ms, last.get(case, 0) + 1)
            times.append(at_ms)
            rows.append(
                (
                    case, f"{row['activity']}.{row['lifecycle']}", row["resource"],
                    float(cases[case]["amount_req"]), local.hour + local.minute / 60.0, local.strftime("%a"),
                    row["activity"] not in REVEALING, cases[case]["outcome"], ends[case],
                )
            )  # fmt: skip
    order = np.argsort(times, kind="stable")
    columns = [np.array(column)[order] for column in zip(*rows, strict=True)]
    return Loans(columns[0], np.array(times, np.int64)[order], *columns[1:])


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)
