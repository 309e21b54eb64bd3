"""Lines that say how far long work is, on the error output: also where it is no terminal, such as in a log."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from remend.cli.escaping import plain

FIRST_SECONDS, SECONDS = 3.0, 10.0
"""How long work goes on before its first line, and the shortest time between two lines."""


class ProgressLines:
    """Prints a line about work that takes long, at most one every :data:`SECONDS`.

    Args:
        console: where to.
        clock: returns the time in seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.what, self.began = "", 0.0
        self.next_line = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take note of how far some work is, and print a line if it is time for one."""
        now = self.clock()
        if what != self.what:
            self.what, self.began = what, now
            self.next_line = max(self.next_line, now + FIRST_SECONDS)
        if now < self.next_line or done >= total:
            return
        self.next_line = now + SECONDS
        share = f"{100 * done // max(total, 1)} %"
        self.console.print(f"{plain(what)}: {share} after {now - self.began:.0f} s", highlight=False, soft_wrap=True)
