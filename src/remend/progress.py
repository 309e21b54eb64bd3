"""Reports of how far long work is, for whoever listens; by default nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
"""Called with what is being done, how many parts are done, and how many there are."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report_progress(what: str, done: int, total: int) -> None:
    """Tell whoever listens that ``done`` of ``total`` parts of some work are done."""
    if (listener := _listener.get()) is not None:
        listener(what, done, total)


@contextmanager
def reported_to(listener: Listener) -> Iterator[None]:
    """Have work within the context, in this thread, reported to ``listener``."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
