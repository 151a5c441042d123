"""Ports and interrupts of a run."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from trainer.demo.processes import Interrupts, free_ports


def test_a_wanted_port_is_taken_where_it_is_free() -> None:
    # Given a port that somebody listens on, and one that nobody does
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        (free,) = free_ports([0])
        # When both are wanted, and twice the free one
        found = free_ports([taken, free, free])
    # Then the free one is given once, and others in place of the rest
    assert found[1] == free
    assert taken not in found
    assert len({*found}) == 3


def test_the_first_interrupt_interrupts_and_further_ones_do_not() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended = False

    def program() -> None:
        nonlocal ended
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not interrupted")
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            ended = True

    # When a program is interrupted, and again while it ends
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        program()
    # Then it comes to its end, and signals do what they did before
    assert ended
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_waits_until_what_is_held_is_done() -> None:
    done = False

    def program(interrupts: Interrupts) -> None:
        nonlocal done
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            done = True
        raise AssertionError("not interrupted")

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        program(interrupts)
    assert done
