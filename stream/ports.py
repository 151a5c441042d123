"""Free TCP ports of 127.0.0.1 for processes that are started here.

Guaranteed: nobody listened on a port at the moment it was picked, and where the system says which ports it gives to
outgoing connections, the port is none of those, so that no connection can take it before the process listens.

Not guaranteed: that another program which listens does not take it in between.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

__all__ = ["HOST", "drawn_from", "free_port", "given_to_connections", "is_free"]

HOST = "127.0.0.1"
_LOWEST, _PORTS = 15_000, 65_536
_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DRAWS = 1_000


def free_port(count: int = 1) -> int:
    """The first of `count` free ports that follow each other.

    Raises
    ------
    OSError: there are none.
    """
    first, last = drawn_from(*given_to_connections(), count)
    # Not the shared generator: where a seed is set, everybody would draw the same ports.
    draw = random.SystemRandom()
    for _ in range(_DRAWS if first <= last else 0):
        port = draw.randint(first, last)
        if all(is_free(port + i) for i in range(count)):
            return port
    raise OSError(f"no {count} free ports of {HOST} between {first} and {last + count - 1}, after {_DRAWS} draws")


def is_free(port: int) -> bool:
    """Whether a process could listen on it now; what a process that ended left behind does not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def drawn_from(low: int, high: int, count: int) -> tuple[int, int]:
    """First and last port to draw where the system gives `low` to `high` to connections: below those, or above, or
    any where those are nearly all; from the last one on there are `count` ports."""
    room = 1_000
    if low - _LOWEST >= room:
        return _LOWEST, low - count
    if _PORTS - high - 1 >= room:
        return high + 1, _PORTS - count
    return _LOWEST, _PORTS - count


def given_to_connections() -> tuple[int, int]:
    """First and last port that the system gives to outgoing connections."""
    try:
        low, high = map(int, _CONNECTIONS.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        # Of other systems: what IANA has for that.
        return 49_152, 65_535
    return low, high
