"""Ports for processes: free, and none that a connection could take."""

from __future__ import annotations

import socket

import pytest

from stream.ports import HOST, drawn_from, free_port, given_to_connections, is_free


def test_ports_are_free_and_follow_each_other() -> None:
    first = free_port(3)
    for port in range(first, first + 3):
        with socket.socket() as listener:
            listener.bind((HOST, port))
            listener.listen()
            assert not is_free(port)


@pytest.mark.parametrize(
    ("low", "high", "first", "last"),
    [(32_768, 60_999, 15_000, 32_766), (49_152, 65_535, 15_000, 49_150), (10_000, 40_000, 40_001, 65_534)],
)
def test_ports_are_drawn_beside_those_that_the_system_gives_to_connections(
    low: int, high: int, first: int, last: int
) -> None:
    assert drawn_from(low, high, 2) == (first, last)


def test_where_the_system_gives_nearly_all_to_connections_any_is_drawn() -> None:
    assert drawn_from(1_024, 65_535, 1) == (15_000, 65_535)


def test_a_port_is_within_what_is_drawn_from_here() -> None:
    first, last = drawn_from(*given_to_connections(), 1)
    assert all(first <= free_port() <= last for _ in range(50))


def test_the_port_of_a_connection_is_not_free() -> None:
    with socket.create_server((HOST, 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert not is_free(client.getsockname()[1])


def test_more_ports_in_a_row_than_there_are_is_an_error() -> None:
    with pytest.raises(OSError, match="no 60000 free ports"):
        free_port(60_000)
