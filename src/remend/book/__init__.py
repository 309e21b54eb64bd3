"""The patch book: a folder that records every edit of a deployed model, and which of them act."""

from remend.book.book import Book
from remend.book.conflicts import Conflict, ConflictError
from remend.book.records import Entry, Event

__all__ = ["Book", "Conflict", "ConflictError", "Entry", "Event"]
