"""Rows of JSON data files, one after another: read as they are needed, and named wherever something is wrong."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from remend.errors import RequestError

CHUNK = 1 << 16
"""Bytes that are read at a time."""
_RECORDS = re.compile(r'\s*\{[^\[]*?"records"\s*:\s*(?=\[)')
"""The beginning of a file of one object that keeps its rows in ``records``."""
_DECODER = json.JSONDecoder()
_NEAR_END = 32
"""A value that ends with the text read so far looks broken no further from its end than this (``-Infinit``)."""

Skip = Callable[[str], None]
"""What a reader tells of everything that it leaves out: the reason, in a few words."""


def ignore(reason: str) -> None:
    """The :data:`Skip` that keeps no count."""


@dataclass(frozen=True)
class Row:
    """One JSON object of a file, with checked access to its keys.

    Attributes:
        content: the object.
        where: what an error calls it: the file, the row, and the keys that lead to it.
        form: what a row of the file looks like, for errors.
        skip: is told of what a reader leaves out.
    """

    content: dict[str, Any]
    where: str
    form: str
    skip: Skip = ignore

    def text(self, key: str) -> str:
        """The text at ``key``.

        Raises:
            RequestError: there is none, or it is blank.
        """
        found = self._typed(key, str, "a text")
        if not found.strip():
            raise self.error(f"{key} is an empty text")
        return str(found)

    def answer(self, key: str) -> str:
        """The text at ``key``, which may be blank: some published files have answers of no words."""
        return str(self._typed(key, str, "a text")).strip()

    def texts(self, key: str) -> list[str]:
        """The texts at ``key``, a list of them or a single one; blank ones are left out.

        Raises:
            RequestError: there are none, or one is no text.
        """
        found = self._typed(key, (str, list), "a text or a list of texts")
        listed = [found] if isinstance(found, str) else found
        if wrong := [text for text in listed if not isinstance(text, str)]:
            raise self.error(f"{key} should hold texts, not {short(wrong[0])}")
        return [text.strip() for text in listed if text.strip()]

    def row(self, key: str) -> Row:
        """The object at ``key``."""
        return Row(self._typed(key, dict, "an object"), f"{self.where}, {key}", self.form, self.skip)

    def rows(self, key: str) -> list[Row]:
        """The objects of the list at ``key``."""
        listed = self._typed(key, list, "a list of objects")
        for number, entry in enumerate(listed, start=1):
            if not isinstance(entry, dict):
                raise self.error(f"{key} should hold objects; number {number} is {short(entry)}")
        return [Row(entry, f"{self.where}, {key} {n}", self.form, self.skip) for n, entry in enumerate(listed, start=1)]

    def name(self, *keys: str) -> str | int | None:
        """What the file calls the row, at the first of ``keys`` that it has."""
        for key in keys:
            if key in self.content:
                found = self._typed(key, (str, int), "a text or a whole number")
                return found if isinstance(found, str) else int(found)
        return None

    def has(self, *keys: str) -> bool:
        """Whether all of ``keys`` are there, and not null."""
        return all(self.content.get(key) is not None for key in keys)

    def error(self, what: str) -> RequestError:
        """What is wrong with the row, with where it is and what it should look like."""
        return RequestError(f"{self.where}: {what}. A row should be {self.form}")

    def _typed(self, key: str, kind: type | tuple[type, ...], name: str) -> Any:
        if key not in self.content:
            raise self.error(f"{key} is missing (there are {', '.join(map(str, self.content)) or 'no keys at all'})")
        found = self.content[key]
        if not isinstance(found, kind) or isinstance(found, bool):
            raise self.error(f"{key} should be {name}, not {short(found)}")
        return found


def short(value: object) -> str:
    """A value as an error shows it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:59]}…"


def read_rows(path: Path, form: str, skip: Skip = ignore) -> Iterator[Row]:
    """The rows of a file, each read only when it is wanted.

    It is one array of objects, an object that holds one as ``records``, or JSON lines.

    Args:
        path: the file.
        form: what a row looks like, for errors.
        skip: handed to the rows.

    Raises:
        RequestError: the file cannot be read or holds no row, or a row is broken; the message names file and row.
    """
    found = False
    for where, value in _values(path):
        if not isinstance(value, dict):
            raise RequestError(f"{where}: an object was expected, not {short(value)}. A row should be {form}")
        found = True
        yield Row(value, where, form, skip)
    if not found:
        raise RequestError(f"{path} holds no row: JSON lines or one array of objects were expected, each {form}")


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            text = _Growing(path, file)
            text.grow()
            start = _RECORDS.match(text.held)
            if start or text.held.lstrip()[:1] == "[":
                text.held = text.held[start.end() :] if start else text.held
                yield from _elements(text)
                if not start and (mark := _next(text)):
                    raise RequestError(f"{path}: after the array's end stands {mark!r}: one array was expected")
            else:
                yield from _lines(text)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}; give a file of the data set") from None


class _Growing:
    """The text of a file as far as it was read, less what was used of it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.held, self.row, self.unit, self.ended = "", 1, "row", False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._broken = ""

    def grow(self, size: int = CHUNK) -> bool:
        """Read on; False at the end of the file.

        Raises:
            RequestError: what comes next is not UTF-8.
        """
        if self._broken:
            raise RequestError(f"{self.where}: {self._broken}; save the file as UTF-8")
        if self.ended:
            return False
        chunk = self.file.read(size)
        self.ended = not chunk
        try:
            self.held += self._decoder.decode(chunk, self.ended)
        except UnicodeDecodeError as error:  # the rows before it are good
            self.held += error.object[: error.start].decode("utf-8-sig" if not self.held else "utf-8")
            self._broken = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        return True

    @property
    def where(self) -> str:
        """The row that is being read."""
        return f"{self.path}, {self.unit} {self.row}"


def _lines(text: _Growing) -> Iterator[tuple[str, Any]]:
    text.unit = "line"
    while True:
        line, newline, later = text.held.partition("\n")
        if not newline and text.grow(max(CHUNK, len(text.held))):
            continue
        text.held = later
        if line.strip():
            try:
                value, end = _decoded(line.strip(), text.where)
            except _BrokenError as error:
                raise RequestError(str(error)) from None
            if rest := line.strip()[end:].strip():
                raise RequestError(f"{text.where}: after its object the line goes on with {short(rest)}; one a line")
            yield text.where, value
        if not newline:
            return
        text.row += 1


def _elements(text: _Growing) -> Iterator[tuple[str, Any]]:
    """The elements of an array, each decoded as soon as all of it was read."""
    text.held = text.held.lstrip().removeprefix("[")
    if _next(text) == "]":
        text.held = text.held.lstrip()[1:]
        return
    while True:
        value, end = _element(text)
        yield text.where, value
        text.held = text.held[end:]
        mark = _next(text)
        if mark not in (",", "]"):
            raise RequestError(
                f"{text.where}: after it {mark or 'the end of the file'!r} stands where ',' or the array's ']' should; "
                "is the file whole?"
            )
        text.held = text.held.lstrip()[1:]
        if mark == "]":
            return
        text.row += 1


def _next(text: _Growing) -> str:
    """The next mark that is no space; empty at the end of the file."""
    while not (stripped := text.held.lstrip()):
        if not text.grow():
            return ""
    return stripped[0]


def _element(text: _Growing) -> tuple[Any, int]:
    while True:
        text.held = text.held.lstrip()
        try:
            value, end = _decoded(text.held, text.where)
        except _BrokenError as error:
            # What is broken far from the end of the text stays so, however much is read.
            if not (error.may_go_on and text.grow(max(CHUNK, len(text.held)))):
                raise RequestError(str(error)) from None
            continue
        if end < len(text.held) or not text.grow():  # a number may go on
            return value, end


class _BrokenError(RequestError):
    """Text that is no JSON value, or not yet."""

    may_go_on = False


def _decoded(text: str, where: str) -> tuple[Any, int]:
    """A JSON value at the beginning of a text, and where it ends."""
    try:
        return _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        place = f"at {short(text[error.pos : error.pos + 20])}" if text[error.pos :].strip() else "where the file ends"
        broken = _BrokenError(f"{where}: broken JSON ({error.msg}) {place}")
        broken.may_go_on = error.pos >= len(text) - _NEAR_END or "Unterminated" in error.msg
        raise broken from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists within lists without end
        raise _BrokenError(f"{where}: JSON that cannot be read ({error})") from None
