"""Signals during training: SIGINT and SIGTERM wait until a step is done, so that a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def defer_interrupts(enabled: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the yielded list in place of ending the process; a second SIGINT does end it.

    Args:
        enabled: whether to do so; a run that writes no checkpoint has no reason to wait.
    """
    received: list[int] = []
    # Python runs signal handlers in the main thread only, and refuses to install them in another.
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
