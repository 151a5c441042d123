"""A long run of random faults: `python -m tests.fault.soak --seed 7`, or `make soak SEED=7`.

Prints each fault with its time and ends with one line of JSON; exit code 1 if anything was lost, doubled or left
unserved for too long. The same seed plays the same schedule again. On Apache Kafka where KAFKA_HOME or the
directory beside the repository names a distribution, otherwise on the embedded broker.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import traceback
from pathlib import Path

from stream.broker import ApacheBroker
from tests.bench.support.site import choose_broker
from tests.fault.play import play
from tests.fault.schedule import EMBEDDED_KINDS, KINDS, draw
from tests.fault.site import Site


def main(arguments: list[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="draws the schedule and the events (%(default)s)")
    parser.add_argument("--faults", type=int, default=100, metavar="N", help="how many (%(default)s)")
    parser.add_argument(
        "--broker", choices=("auto", "apache", "embedded"), default="auto", help="default: apache where it is"
    )
    parser.add_argument("--per-second", type=float, default=300.0, metavar="N", help="events published (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the schedule and run nothing")
    parser.add_argument("--keep", metavar="DIR", help="keep settings, logs and disks here")
    options = parser.parse_args(arguments)
    # A broker that is away on purpose is no news.
    logging.getLogger("stream").setLevel(logging.CRITICAL + 1)
    with tempfile.TemporaryDirectory(prefix="livestate-soak-") as temporary:
        directory = Path(options.keep or temporary)
        broker = choose_broker(options.broker, directory / "broker")
        kinds = KINDS if isinstance(broker, ApacheBroker) else EMBEDDED_KINDS
        schedule = draw(options.seed, options.faults, kinds)
        if options.list:
            for fault in schedule:
                print(fault)
            return 0
        again = (
            f"python -m tests.fault.soak --seed {options.seed} --faults {options.faults} "
            f"--broker {'apache' if kinds == KINDS else 'embedded'} --per-second {options.per_second:g}"
        )
        try:
            with broker, Site(broker, directory / "site") as site:
                outcome = play(site, schedule, seed=options.seed, per_second=options.per_second, log=_say)
        except AssertionError:
            traceback.print_exc()
            _say(f"seed {options.seed} failed; once more with: {again}")
            _say(json.dumps({"seed": options.seed, "ok": False}))
            return 1
    for problem in outcome.problems:
        _say(problem)
    if outcome.problems:
        _say(f"seed {options.seed} failed; once more with: {again}")
    _say(json.dumps({"seed": options.seed, **outcome.figures()}))
    return 1 if outcome.problems else 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
