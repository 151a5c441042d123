"""Loan applications as a stream to measure quality on; see `tests.support.loans`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stream.wire import FeedbackRecord, encode_event, encode_feedback
from tests.bench.quality.streams import EXAMPLES, Points, Stream
from tests.support.loans import EVALUATED_FROM_MS, Loans, load_loans, loans_directory

__all__ = ["loan_stream"]

Floats = NDArray[np.float64]


def loan_stream(cases: int | None = None) -> Stream:
    """Will this application be approved? See `tests.support.loans`.

    Parameters
    ----------
    cases: only the first so many; judged from the middle of their stream then.

    Raises
    ------
    SystemExit: the data are not here.
    """
    directory = loans_directory()
    if directory is None:
        raise SystemExit("the loan data are not here: set BPIC2012_HOME to a directory with events.csv.gz")
    loans = load_loans(directory)
    judged_from_ms = EVALUATED_FROM_MS
    if cases is not None:
        loans = loans.until(cases)
        judged_from_ms = int(np.median(loans.timestamp_ms))
    task = "approved"
    columns = zip(
        loans.timestamp_ms.tolist(), loans.case.tolist(), loans.amount.tolist(), loans.hour.tolist(),
        loans.weekday.tolist(), loans.activity.tolist(), loans.resource.tolist(), strict=True,
    )  # fmt: skip
    names = ("amount", "hour", "weekday", "activity", "resource")
    events = [
        (at, case.encode(), encode_event(case, at, "step", dict(zip(names, fields, strict=True))))
        for at, case, *fields in columns
    ]
    asked = np.flatnonzero(loans.asked)
    approved = loans.outcome == "APPROVED"
    points = Points(
        loans.case[asked], loans.timestamp_ms[asked], approved[asked], loans.outcome_ms[asked],
        _aggregates(loans)[asked], codes=3,
    )  # fmt: skip
    feedback = [
        (known, case.encode(), encode_feedback(FeedbackRecord(case, known, at, task, label)))
        for known, case, at, label in zip(
            points.known_ms.tolist(), points.client.tolist(), points.as_of_ms.tolist(), points.label.tolist(),
            strict=True,
        )
    ]  # fmt: skip
    feedback.sort(key=lambda one: one[0])
    first_ms = int(loans.timestamp_ms[0])
    return Stream(
        settings=EXAMPLES / "bank.toml",
        task=task,
        output=task,
        events=events,
        feedback=feedback,
        points=points,
        judged_from_ms=judged_from_ms,
        trunk="random",
        trunk_until_ms=first_ms + (judged_from_ms - first_ms) // 2,
        pace=1_500.0,
        behind=2_000,
        fits=1,
        leaf_examples=200,
        penalty=10.0,
        rate=0.0001,
        intercept_rate=0.0001,
    )


def _aggregates(loans: Loans) -> NDArray[np.float32]:
    """(n, A): counts of each activity so far, hours since each, since the first event and the one before, events so
    far, people so far, amount, hour, weekday, and codes of the last two activities and of who did the last."""
    order = np.lexsort((loans.timestamp_ms, loans.case))
    case, at = loans.case[order], loans.timestamp_ms[order]
    n = len(case)
    new = np.append(True, case[1:] != case[:-1])
    first = np.maximum.accumulate(np.where(new, np.arange(n), 0))
    number = np.arange(n) - first
    _, activity = np.unique(loans.activity[order], return_inverse=True)
    _, resource = np.unique(loans.resource[order], return_inverse=True)
    _, weekday = np.unique(loans.weekday[order], return_inverse=True)
    columns: list[Floats] = []
    for code in range(int(activity.max()) + 1):
        here = (activity == code).astype(np.float64)
        total = np.cumsum(here)
        columns.append(total - (total - here)[first])
        latest = np.maximum.accumulate(np.where(here > 0, np.arange(n), -1))
        seen = latest >= first
        columns.append(np.where(seen, (at - at[np.maximum(latest, 0)]) / 3_600_000.0, np.nan))
    before = np.maximum(np.arange(n) - 1, first)
    changed = np.cumsum((resource != resource[before]).astype(np.float64))
    columns += [
        (at - at[first]) / 3_600_000.0, (at - at[before]) / 3_600_000.0, number.astype(np.float64),
        changed - changed[first], loans.amount[order], loans.hour[order], weekday.astype(np.float64),
        activity.astype(np.float64), np.where(number > 0, activity[before], -1).astype(np.float64),
        resource.astype(np.float64),
    ]  # fmt: skip
    out = np.empty((n, len(columns)), np.float32)
    out[order] = np.stack(columns, axis=1)
    return out
