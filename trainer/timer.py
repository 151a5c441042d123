"""What is done now and then by a loop that looks again and again."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Timer"]


@dataclass
class Timer:
    """True once in `seconds` on average; after a rest, up to `burst` times together.

    Parameters
    ----------
    seconds: between two times, by the clock of `is_due`.
    burst: with 1, each time is at least `seconds` after the one before.
    """

    seconds: float
    burst: int = 1
    due_at: float = 0.0

    def is_due(self, now: float) -> bool:
        """Whether it is time; if so, that counts as one.

        Parameters
        ----------
        now: seconds, monotonic.
        """
        if now < self.due_at:
            return False
        # A rest, however long, saves up no more than one burst.
        self.due_at = max(self.due_at, now - (self.burst - 1) * self.seconds) + self.seconds
        return True
