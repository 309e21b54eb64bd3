"""Rows of JSON data files with checked access to their keys: what the reader of a published data set is made of."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remend.data.json_stream import shorten
from remend.data.row_files import iterate_rows
from remend.errors import RequestError
from remend.request import EditRequest

Skip = Callable[[str], None]
"""A function that a reader calls for each thing that it leaves out, with the reason in a few words."""


def ignore(reason: str) -> None:
    """Do nothing: the :data:`Skip` of callers who do not count what is left out."""


def is_absent(value: object) -> bool:
    """Tell whether a value stands for none: null, or NaN, which tables have for absent cells."""
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True)
class JsonRow:
    """One JSON object of a file, with checked access to its keys.

    Attributes:
        content: the object.
        where: its place for messages: the file, the row, and the keys that lead to it.
        form: what a row of the file looks like, for messages.
        skip: called with the reason for each thing that a reader leaves out.
    """

    content: dict[str, Any]
    where: str
    form: str
    skip: Skip = ignore

    def text(self, key: str) -> str:
        """Return the text at ``key``.

        Raises:
            RequestError: there is none, or it is blank.
        """
        text = self._typed(key, str, "a text")
        if not text.strip():
            raise self.error(f"{key} is an empty text")
        return str(text)

    def text_if_any(self, *keys: str) -> str | None:
        """Return the text at the first of ``keys`` that holds one; None where they are absent or blank."""
        return next((text for key in keys if self.has(key) and (text := self.answer(key))), None)

    def answer(self, key: str) -> str:
        """Return the text at ``key`` without outer spaces; it may be empty, since some published answers are."""
        return str(self._typed(key, str, "a text")).strip()

    def texts(self, key: str) -> list[str]:
        """Return the texts at ``key``, a list of them or a single one, without blank ones.

        Raises:
            RequestError: the key is missing, or holds something else.
        """
        value = self._typed(key, (str, list), "a text or a list of texts")
        # The same key holds one text in some published files and a list in others.
        texts = [value] if isinstance(value, str) else value
        if invalid := [text for text in texts if not isinstance(text, str)]:
            raise self.error(f"{key} should hold texts, not {shorten(invalid[0])}")
        return [text.strip() for text in texts if text.strip()]

    def texts_if_any(self, key: str) -> list[str]:
        """Return the texts at ``key``; none where it is absent."""
        return self.texts(key) if self.has(key) else []

    def row(self, key: str) -> JsonRow:
        """Return the object at ``key``."""
        return JsonRow(self._typed(key, dict, "an object"), f"{self.where}, {key}", self.form, self.skip)

    def rows(self, key: str) -> list[JsonRow]:
        """Return the objects of the list at ``key``."""
        objects = self._typed(key, list, "a list of objects")
        for number, item in enumerate(objects, start=1):
            if not isinstance(item, dict):
                raise self.error(f"{key} should hold objects; number {number} is {shorten(item)}")
        return [
            JsonRow(item, f"{self.where}, {key} {number}", self.form, self.skip)
            for number, item in enumerate(objects, start=1)
        ]

    def rows_if_any(self, key: str) -> list[JsonRow]:
        """Return the objects of the list at ``key``; none where it is absent."""
        return self.rows(key) if self.has(key) else []

    def name(self, *keys: str) -> str | int | None:
        """Return the row's name or number in the file: the value of the first of ``keys`` that it has."""
        for key in keys:
            if self.has(key):
                value = self.content[key]
                if isinstance(value, float) and value.is_integer():  # pandas writes a column with gaps so
                    return int(value)
                value = self._typed(key, (str, int), "a text or a whole number")
                return value if isinstance(value, str) else int(value)
        return None

    def has(self, *keys: str) -> bool:
        """Tell whether all of ``keys`` are there and not absent."""
        return not any(is_absent(self.content.get(key)) for key in keys)

    def count_misspelt(self) -> None:
        """Report the keys that look like misspelt ones of the form to ``skip``, since no reader asks for them."""
        for key, similar in _misspelt(frozenset(map(str, self.content)), self.form):
            self.skip(f"values of {key!r}, a key that is not known (did you mean {similar!r}?)")

    def error(self, reason: str) -> RequestError:
        """Return an error that says where the row is, what is wrong with it and what it should look like."""
        return RequestError(f"{self.where}: {reason}. A row should be {self.form}")

    def _typed(self, key: str, types: type | tuple[type, ...], description: str) -> Any:
        if not self.has(key):
            raise self.error(f"{key} is missing (there are {name_keys(self.content)})")
        value = self.content[key]
        # bool is a subclass of int, and true is no name or number of a row.
        if not isinstance(value, types) or isinstance(value, bool):
            raise self.error(f"{key} should be {description}, not {shorten(value)}")
        return value


def read_rows(path: Path, form: str, skip: Skip = ignore) -> Iterator[JsonRow]:
    """Yield the rows of a file, each read only when it is needed.

    The file is one of those that :func:`iterate_rows` reads.

    Args:
        path: the file.
        form: what a row looks like, for messages.
        skip: passed to the rows.

    Raises:
        RequestError: the file cannot be read or holds no row, or a row is broken; the message names file and row.
    """
    empty = True
    for where, value in iterate_rows(path):
        if not isinstance(value, dict):
            raise RequestError(f"{where}: an object was expected, not {shorten(value)}. A row should be {form}")
        empty = False
        row = JsonRow(value, where, form, skip)
        row.count_misspelt()
        yield row
    if empty:
        raise RequestError(f"{path} holds no row: JSON lines or one array of objects were expected, each {form}")


def name_keys(content: dict[str, Any]) -> str:
    """Return the keys of a row, for messages; of many the first."""
    return ", ".join([*map(str, list(content)[:16]), *(["…"] if len(content) > 16 else [])]) or "no keys at all"


def keys_of(form: str) -> set[str]:
    """Return the keys in a description of a row."""
    return set(re.findall(r'"(\w+)":', form))


# Cached, since the rows of a file have the same keys.
@functools.lru_cache(maxsize=64)
def _misspelt(keys: frozenset[str], form: str) -> list[tuple[str, str]]:
    """Return the keys of a row that look like misspelt ones of its form, which would be lost without a word."""
    missing = keys_of(form) - keys
    similar = {key: difflib.get_close_matches(key, missing, n=1, cutoff=0.8) for key in sorted(keys - keys_of(form))}
    return [(key, names[0]) for key, names in similar.items() if names]


class JsonReader:
    """The reader of a data set's files: called with a path (and a :data:`Skip`), it yields edit requests.

    Attributes:
        form: what a row of the files looks like.
    """

    def __init__(self, form: str, parse: Callable[[Iterator[JsonRow]], Iterator[EditRequest]]) -> None:
        self.form = form
        self._parse = parse
        # Name and docstring of the function, for the documentation and for the help of entry points.
        functools.update_wrapper(self, parse)

    def __call__(self, path: Path, skip: Skip = ignore) -> Iterator[EditRequest]:
        """Yield the edit requests of a file.

        Raises:
            RequestError: the file cannot be read, or a row is broken; the message names it.
        """
        return self._parse(read_rows(path, self.form, skip))


def json_reader(form: str) -> Callable[[Callable[[Iterator[JsonRow]], Iterator[EditRequest]]], JsonReader]:
    """Return a decorator that makes the reader of a data set from a function of its rows.

    For example::

        @json_reader('{"question": …, "answer": …}')
        def read(rows: Iterator[JsonRow]) -> Iterator[EditRequest]:
            for row in rows:
                yield EditRequest(prompt=row.text("question"), target=row.text("answer"))

    Args:
        form: what a row of the files looks like, for messages and ``remend data show``.
    """
    return functools.partial(JsonReader, form)
