"""Ports for processes: free, and none that a connection could take."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from stream.ports import HOST, free_port, is_free


def test_ports_are_free_and_follow_each_other() -> None:
    first = free_port(3)
    for port in range(first, first + 3):
        with socket.socket() as listener:
            listener.bind((HOST, port))
            listener.listen()
            assert not is_free(port)


def test_no_port_is_one_that_the_system_gives_to_connections() -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not given.exists():
        pytest.skip("the system does not say which ports it gives to connections")
    low, high = map(int, given.read_text().split())
    if low < 17_000 and high > 64_000:
        pytest.skip("the system gives nearly all ports to connections")
    assert not [port for port in (free_port() for _ in range(200)) if low <= port <= high]


def test_the_port_of_a_connection_is_not_free() -> None:
    with socket.create_server((HOST, 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert not is_free(client.getsockname()[1])


def test_more_ports_in_a_row_than_there_are_is_an_error() -> None:
    with pytest.raises(OSError, match="no 60000 free ports"):
        free_port(60_000)
