"""Publishes the year to Kafka in stream time, as fast as it is allowed.

Guarantees: events go out in stream order; feedback of stream time t is produced after every event before t
was acknowledged; what was produced was acknowledged by the broker when `replay` returns, or it raises.

Not guaranteed: the pace of the year itself. Records carry the time of publishing as their Kafka timestamp, as
any publisher's do; the stream's time is inside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from stream.errors import BrokerError, LivestateError
from stream.kafka import ensure_topics, producer_config, wait_until_reachable
from stream.settings import Settings, load
from stream.wire import FeedbackRecord, encode_feedback
from trainer.demo import journey as demo
from trainer.demo.encoding import EventPacker
from trainer.demo.journey import Journey

__all__ = ["Progress", "replay"]

#: Events between two looks at the clock, the lag and the feedback due.
CHUNK = 2_000
LAG_INTERVAL_S = 0.1
FLUSH_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Progress:
    """How far a replay has come."""

    #: time of the last event published, UTC ms; 0 before the first
    stream_ms: int
    events: int
    events_total: int
    feedback: int
    feedback_total: int
    elapsed_s: float
    #: as last asked for; 0 where nobody says
    lag: int
    done: bool


class _Outlet:
    """A producer that waits when its queue is full and remembers what was refused."""

    def __init__(self, settings: Settings) -> None:
        # Uncompressed: the broker is on this machine, and the embedded one unpacks batches to serve them.
        self._producer = Producer(
            {
                **producer_config(settings, compression_type="none", linger_ms=10),
                "delivery.report.only.error": True,
            }
        )
        self._refused: KafkaError | None = None

    def _note(self, error: KafkaError | None, message: Message) -> None:
        if error is not None and self._refused is None:
            self._refused = error

    def send(self, topic: str, keys: list[bytes], values: list[bytes]) -> None:
        produce, note = self._producer.produce, self._note
        for key, value in zip(keys, values, strict=True):
            while True:
                try:
                    produce(topic, value, key, on_delivery=note)
                    break
                except BufferError:
                    self._producer.poll(0.01)
                except KafkaException as error:
                    raise BrokerError(f"a record was not delivered: {error.args[0].str()}") from error
        self._producer.poll(0)
        self._check()

    def flush(self) -> None:
        left = self._producer.flush(FLUSH_TIMEOUT_S)
        self._check()
        if left:
            raise BrokerError(f"{left} records were not acknowledged within {FLUSH_TIMEOUT_S:g} s")

    def poll(self, seconds: float) -> None:
        self._producer.poll(seconds)

    def _check(self) -> None:
        if self._refused is not None:
            raise BrokerError(f"a record was not delivered: {self._refused.str()}")


def replay(
    settings: Settings,
    journey: Journey,
    *,
    start_ms: int | None = None,
    end_ms: int | None = None,
    rate: float | None = None,
    lag: Callable[[], int] | None = None,
    max_lag: int = 100_000,
    progress: Callable[[Progress], None] | None = None,
    stopping: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Publish the events from `start_ms` to before `end_ms` (all by default) and the feedback of that time.

    Parameters
    ----------
    rate: events a second at most; as fast as possible by default.
    lag: how many published events the workers have not applied yet; asked about ten times a second. Nothing
    is published while it is above `max_lag`.
    progress: called about ten times a second, and once at the end with `done`.
    stopping: asked between chunks; when true, what was produced is flushed and the replay ends early.
    clock: seconds, monotonic.

    Raises
    ------
    BrokerError: a record was refused, or not acknowledged in time.
    """
    part = journey.between(start_ms, end_ms)
    first_ms = -sys.maxsize if start_ms is None else start_ms
    last_ms = sys.maxsize if end_ms is None else end_ms
    labels = [record for record in journey.feedback() if first_ms <= record.timestamp_ms < last_ms]
    # Label j may go out once this many events have: all those before its time.
    label_at = np.searchsorted(journey.timestamp_ms, [record.timestamp_ms for record in labels], "left").tolist()
    packer, outlet = EventPacker(journey), _Outlet(settings)
    begin = clock()
    at, label, behind = part.start, 0, 0
    told = asked = -float("inf")
    ended_early = False

    def report(done: bool) -> Progress:
        return Progress(
            stream_ms=int(journey.timestamp_ms[at - 1]) if at > part.start else 0,
            events=at - part.start,
            events_total=part.stop - part.start,
            feedback=label,
            feedback_total=len(labels),
            elapsed_s=clock() - begin,
            lag=behind,
            done=done,
        )

    while at < part.stop or label < len(labels):
        if stopping is not None and stopping():
            ended_early = True
            break
        now = clock()
        if progress is not None and now - told >= LAG_INTERVAL_S:
            told = now
            progress(report(done=False))
        if lag is not None and now - asked >= LAG_INTERVAL_S:
            asked = now
            behind = lag()
        if behind > max_lag:
            outlet.poll(LAG_INTERVAL_S / 2)
            continue
        due = part.stop if rate is None else part.start + int((now - begin) * rate) + 1
        next_label = max(label_at[label], part.start) if label < len(labels) else part.stop
        if label < len(labels) and at >= next_label:
            label = _publish_due(outlet, settings, labels, label_at, label, at)
            continue
        until = min(at + CHUNK, part.stop, next_label, due)
        if until > at:
            outlet.send(settings.topics.events, *packer.pack(slice(at, until)))
            at = until
        else:
            outlet.poll(min(0.01, CHUNK / (rate or CHUNK)))
    outlet.flush()
    final = report(done=not ended_early)
    if progress is not None:
        progress(final)
    return final


def _publish_due(
    outlet: _Outlet,
    settings: Settings,
    labels: list[FeedbackRecord],
    label_at: list[int],
    label: int,
    at: int,
) -> int:
    """Publish the labels that may go out after `at` events, once those are acknowledged; the next label."""
    outlet.flush()
    after = label
    while after < len(labels) and label_at[after] <= at:
        after += 1
    chosen = labels[label:after]
    outlet.send(
        settings.topics.feedback,
        [record.client_id.encode() for record in chosen],
        [encode_feedback(record) for record in chosen],
    )
    return after


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m trainer.demo.replay SETTINGS`."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.demo.replay",
        description="Publish the Complete Journey purchases, campaign sends and redemptions to Kafka.",
        epilog="example: python -m trainer.demo.replay stream/examples/shop.toml --rate 20000",
    )
    parser.add_argument("settings", help="settings file (TOML)")
    parser.add_argument("--rate", type=float, help="events a second at most (default: as fast as possible)")
    parser.add_argument("--start", metavar="DATE", help="first day published, for example 2017-04-01")
    parser.add_argument("--end", metavar="DATE", help="first day no longer published")
    chosen = parser.parse_args(arguments)
    try:
        settings = load(chosen.settings)
        wait_until_reachable(settings)
        ensure_topics(settings, create=True)
        final = replay(
            settings,
            demo.load(),
            start_ms=_day(parser, chosen.start),
            end_ms=_day(parser, chosen.end),
            rate=chosen.rate,
            progress=_show,
        )
    except LivestateError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(f"{final.events} events, {final.feedback} labels in {final.elapsed_s:.1f} s")
    return 0


def _day(parser: argparse.ArgumentParser, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(np.datetime64(text, "D").astype("datetime64[ms]").astype(np.int64))
    except ValueError:
        parser.error(f"{text!r}: expected a day such as 2017-04-01")


def _show(progress: Progress) -> None:
    if sys.stderr.isatty():
        day = np.datetime64(progress.stream_ms, "ms").astype("datetime64[D]")
        speed = progress.events / max(progress.elapsed_s, 1e-9)
        end = "\n" if progress.done else "\r"
        line = f"{day}  {progress.events}/{progress.events_total} events  {speed:,.0f}/s"
        print(line, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
