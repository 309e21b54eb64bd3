"""Streaming JSON: the values of an array or of JSON lines, each decoded as soon as it was read.

The standard library's decoder does the parsing, and the code below only feeds it. ijson was tried in its place. It
cannot say in which row a file is broken, rejects NaN, byte order marks and integers of more than 64 bits, silently
replaces lone surrogates, and a file of 100,000 opening brackets exhausts its memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from remend.errors import RequestError

CHUNK_BYTES = 1 << 16
"""Bytes that are read at a time."""
MAX_ROW_CHARACTERS = 1 << 25
"""The most characters of a row: a small gzip file may hold a line that fills all memory."""
# Nothing but plain values may come before: an array there could hold a "records" key of its own.
_RECORDS = re.compile(r'\s*\{[^\[]*?"records"\s*:\s*(?=\[)')
"""The beginning of a file of one object that keeps its rows in ``records``."""
_OBJECT_OVER_LINES = re.compile(r"\s*\{[^\S\n]*\r?\n")
"""The beginning of a file whose first line is an opening brace."""
_DECODER = json.JSONDecoder()
_TAIL_CHARACTERS = 32
"""How far before the end of the text that was read an incomplete value can look broken (``-Infinit``)."""


class Readable(Protocol):
    """A file of bytes."""

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes; none at the end."""
        ...


def iterate_values(path: Path, file: Readable) -> Iterator[tuple[str, Any]]:
    """Yield the values of a file, each with its place for messages (``data.json, row 3``).

    The file is one array, an object that holds one as ``records``, one object over several lines, or JSON lines.

    Args:
        path: the file's name, for messages.
        file: its bytes.

    Raises:
        RequestError: a value is broken; the message names its place.
        OSError: the file cannot be read.
    """
    buffer = _Buffer(path, file)
    buffer.grow()
    records = _RECORDS.match(buffer.text)
    if records or buffer.text.lstrip()[:1] == "[":
        buffer.text = buffer.text[records.end() :] if records else buffer.text
        yield from _array_elements(buffer)
        # What follows the array of an object with "records" are the object's other keys, which are not needed.
        if not records and (mark := _next_mark(buffer)):
            raise RequestError(f"{path}: {mark!r} follows the end of the array; the file should be one array")
    elif _OBJECT_OVER_LINES.match(buffer.text):
        buffer.unit = "object"
        value, end = _array_element(buffer)
        buffer.text = buffer.text[end:]
        if mark := _next_mark(buffer):
            raise RequestError(
                f"{path}: {mark!r} follows the first object, which takes several lines. Write each object in one "
                "line, or all in one array"
            )
        yield buffer.where, value
    else:
        yield from _lines(buffer)


def shorten(value: object) -> str:
    """Return a value as JSON of at most 60 characters, for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:59]}…"


class _Buffer:
    """The text of a file that was read and not yet decoded.

    Attributes:
        text: that text.
        row: the number of the row that is being decoded, from 1.
        unit: what a row is called in messages.
    """

    def __init__(self, path: Path, file: Readable) -> None:
        self.path, self.file = path, file
        self.text, self.row, self.unit = "", 1, "row"
        self._ended = False
        # Incremental, since a chunk may end within a character of several bytes; "-sig" drops a byte order mark.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._encoding_error = ""

    def grow(self, size: int | None = None) -> bool:
        """Read more of the file into ``text``; return False at its end.

        Raises:
            RequestError: the next bytes are not UTF-8.
        """
        if self._encoding_error:
            raise RequestError(f"{self.where}: {self._encoding_error}; save the file as UTF-8")
        if self._ended:
            return False
        if len(self.text) > MAX_ROW_CHARACTERS:
            raise RequestError(
                f"{self.where}: it is longer than {MAX_ROW_CHARACTERS:,} characters; is this a file of requests?"
            )
        chunk = self.file.read(size or CHUNK_BYTES)
        self._ended = not chunk
        try:
            self.text += self._decoder.decode(chunk, self._ended)
        except UnicodeDecodeError as error:
            # The rows before the bad byte are good, so the error waits until they were decoded.
            self.text += error.object[: error.start].decode("utf-8-sig" if not self.text else "utf-8")
            self._encoding_error = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        return True

    @property
    def where(self) -> str:
        """The file and the row that is being decoded, for messages."""
        return f"{self.path}, {self.unit} {self.row}"

    def grow_twofold(self) -> bool:
        """Read as much again as ``text`` holds, so that a value of n characters is decoded log n times, not n times."""
        return self.grow(max(CHUNK_BYTES, len(self.text)))


def _lines(buffer: _Buffer) -> Iterator[tuple[str, Any]]:
    buffer.unit = "line"
    while True:
        # Not str.splitlines: it also splits at separators such as U+2028, which JSON allows within texts.
        line, newline, rest = buffer.text.partition("\n")
        if not newline and buffer.grow_twofold():
            continue
        buffer.text = rest
        if line.strip():
            try:
                value, end = _decode(line.strip(), buffer.where)
            except _BrokenJsonError as error:
                raise RequestError(str(error)) from None
            # Two objects in a line are an error rather than two rows, so that the number of a line names one row.
            if surplus := line.strip()[end:].strip():
                raise RequestError(
                    f"{buffer.where}: {shorten(surplus)} follows the object; each line should be one object"
                )
            yield buffer.where, value
        if not newline:
            return
        buffer.row += 1


def _array_elements(buffer: _Buffer) -> Iterator[tuple[str, Any]]:
    buffer.text = buffer.text.lstrip().removeprefix("[")
    if _next_mark(buffer) == "]":
        buffer.text = buffer.text.lstrip()[1:]
        return
    while True:
        value, end = _array_element(buffer)
        yield buffer.where, value
        buffer.text = buffer.text[end:]
        mark = _next_mark(buffer)
        if mark not in (",", "]"):
            raise RequestError(
                f"{buffer.where}: {mark or 'the end of the file'!r} follows it, where ',' or the array's ']' should; "
                "is the file complete?"
            )
        buffer.text = buffer.text.lstrip()[1:]
        if mark == "]":
            return
        buffer.row += 1


def _next_mark(buffer: _Buffer) -> str:
    """Return the next character that is no space; empty at the end of the file."""
    while not (stripped := buffer.text.lstrip()):
        if not buffer.grow():
            return ""
    return stripped[0]


def _array_element(buffer: _Buffer) -> tuple[Any, int]:
    while True:
        buffer.text = buffer.text.lstrip()
        try:
            value, end = _decode(buffer.text, buffer.where)
        except _BrokenJsonError as error:
            # What is broken far from the end of the text stays broken, however much is read.
            if not (error.may_be_incomplete and buffer.grow_twofold()):
                raise RequestError(str(error)) from None
            continue
        # A number at the end of the text may continue in what is read next.
        if end < len(buffer.text) or not buffer.grow():
            return value, end


class _BrokenJsonError(RequestError):
    """Text that is no JSON value, or not yet a complete one."""

    may_be_incomplete = False


def _decode(text: str, where: str) -> tuple[Any, int]:
    """Return the JSON value at the beginning of a text, and where it ends."""
    try:
        return _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :]
        place = f"at {shorten(rest[:20])}" if rest.strip() else "at the end of the file"
        broken = _BrokenJsonError(f"{where}: broken JSON ({error.msg}) {place}")
        broken.may_be_incomplete = error.pos >= len(text) - _TAIL_CHARACTERS or "Unterminated" in error.msg
        raise broken from None
    except (ValueError, RecursionError) as error:
        # Python refuses integers of more than 4,300 digits and deeply nested lists.
        raise _BrokenJsonError(f"{where}: JSON that cannot be read ({error})") from None
