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
from remend.saved_folders import check_writable, unique_keys

CHUNK_BYTES = 1 << 16
"""Bytes that are read at a time."""
MAX_ROW_CHARACTERS = 1 << 22
"""The most characters of a row: a small gzip file may hold a line that fills all memory."""
# Nothing but plain values may come before: an array there could hold a "records" key of its own.
_RECORDS = re.compile(r'\s*\{[^\[]*?"records"\s*:\s*(?=\[)')
"""The beginning of a file of one object that keeps its rows in ``records``."""
_OBJECT_OVER_LINES = re.compile(r"\s*\{[^\S\n]*\r?\n")
"""The beginning of a file whose first line is an opening brace."""
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
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
        buffer.position = records.end() if records else 0
        yield from _array_elements(buffer)
        # What follows the array of an object with "records" are the object's other keys, which are not needed.
        if not records and (mark := _next_mark(buffer)):
            raise RequestError(f"{path}: {mark!r} follows the end of the array; the file should be one array")
    elif _OBJECT_OVER_LINES.match(buffer.text):
        buffer.unit = "object"
        value = _array_element(buffer)
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
        position: where in it what was not yet decoded begins.
        row: the number of the row that is being decoded, from 1.
        unit: what a row is called in messages.
    """

    def __init__(self, path: Path, file: Readable) -> None:
        self.path, self.file = path, file
        self.text, self.position, self.row, self.unit = "", 0, 1, "row"
        self._ended = False
        self._characters_since_value = 0
        # Incremental, since a chunk may end within a character of several bytes; "-sig" drops a byte order mark.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._encoding_error = ""

    @property
    def where(self) -> str:
        """The file and the row that is being decoded, for messages."""
        return f"{self.path}, {self.unit} {self.row}"

    def grow(self, size: int | None = None) -> bool:
        """Read more of the file into ``text``, from which what was decoded is dropped; return False at its end.

        Raises:
            RequestError: the next bytes are not UTF-8, or no value ended in too many characters.
        """
        if self._encoding_error:
            raise RequestError(f"{self.where}: {self._encoding_error}; save the file as UTF-8")
        if self._ended:
            return False
        if self._characters_since_value > MAX_ROW_CHARACTERS:
            raise RequestError(
                f"{self.where}: it is longer than {MAX_ROW_CHARACTERS:,} characters; is this a file of requests?"
            )
        chunk = self.file.read(size or CHUNK_BYTES)
        self._ended = not chunk
        try:
            more = self._decoder.decode(chunk, self._ended)
        except UnicodeDecodeError as error:
            # The rows before the bad byte are good, so the error waits until they were decoded.
            more = error.object[: error.start].decode("utf-8" if self.text else "utf-8-sig")
            self._encoding_error = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        self.text, self.position = self.text[self.position :] + more, 0
        self._characters_since_value += len(more)
        return True

    def grow_twofold(self) -> bool:
        """Read as much again as is not decoded, so that a value of n characters is decoded log n times, not n times."""
        return self.grow(max(CHUNK_BYTES, len(self.text) - self.position))

    def take(self, end: int) -> None:
        """Go on behind a value that ends at ``end``."""
        self.position, self._characters_since_value = end, 0

    def skip_space(self) -> None:
        """Go on at the next character that is no space, counting the lines if they are the rows."""
        if space := _SPACE.match(self.text, self.position):
            self.row += self.text.count("\n", *space.span()) if self.unit == "line" else 0
            self.position = space.end()


def _lines(buffer: _Buffer) -> Iterator[tuple[str, Any]]:
    buffer.unit = "line"
    while _next_mark(buffer):
        # Not str.splitlines: it also splits at separators such as U+2028, which JSON allows within texts.
        end = buffer.text.find("\n", buffer.position)
        if end < 0 and buffer.grow_twofold():
            continue
        line = buffer.text[buffer.position : end if end >= 0 else None]
        try:
            value, value_end = _decode(line, 0, buffer.where)
        except _BrokenJsonError as error:
            raise RequestError(str(error)) from None
        # Two objects in a line are an error rather than two rows, so that the number of a line names one row.
        if surplus := line[value_end:].strip():
            raise RequestError(f"{buffer.where}: {shorten(surplus)} follows the object; each line should be one object")
        buffer.take(buffer.position + len(line))
        yield buffer.where, value


def _array_elements(buffer: _Buffer) -> Iterator[tuple[str, Any]]:
    buffer.skip_space()
    buffer.position += 1
    if _next_mark(buffer) == "]":
        buffer.position += 1
        return
    while True:
        value = _array_element(buffer)
        yield buffer.where, value
        mark = _next_mark(buffer)
        if mark not in (",", "]"):
            raise RequestError(
                f"{buffer.where}: {mark or 'the end of the file'!r} follows it, where ',' or the array's ']' should; "
                "is the file complete?"
            )
        buffer.position += 1
        if mark == "]":
            return
        buffer.row += 1


def _next_mark(buffer: _Buffer) -> str:
    """Return the next character that is no space; empty at the end of the file."""
    while True:
        buffer.skip_space()
        if buffer.position < len(buffer.text):
            return buffer.text[buffer.position]
        if not buffer.grow():
            return ""


def _array_element(buffer: _Buffer) -> Any:
    while True:
        buffer.skip_space()
        try:
            value, end = _decode(buffer.text, buffer.position, buffer.where)
        except _BrokenJsonError as error:
            # What is broken far from the end of the text stays broken, however much is read.
            if not (error.may_be_incomplete and buffer.grow_twofold()):
                raise RequestError(str(error)) from None
            continue
        # A number at the end of the text may continue in what is read next.
        if end < len(buffer.text) or not buffer.grow():
            buffer.take(end)
            return value


class _BrokenJsonError(RequestError):
    """Text that is no JSON value, or not yet a complete one."""

    may_be_incomplete = False


def _decode(text: str, start: int, where: str) -> tuple[Any, int]:
    """Return the JSON value that begins at ``start``, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        check_writable(value)
    except json.JSONDecodeError as error:
        rest = text[error.pos :]
        place = f"at {shorten(rest[:20])}" if rest.strip() else "where it ends"
        broken = _BrokenJsonError(f"{where}: broken JSON ({error.msg}) {place}")
        broken.may_be_incomplete = error.pos >= len(text) - _TAIL_CHARACTERS or "Unterminated" in error.msg
        raise broken from None
    except UnicodeEncodeError as error:
        surrogate = error.object[error.start : error.end][:1]
        raise _BrokenJsonError(f"{where}: \\u{ord(surrogate):04x} is half of a character: write both halves") from None
    except (ValueError, RecursionError) as error:
        # Python refuses integers of more than 4,300 digits and deeply nested lists.
        raise _BrokenJsonError(f"{where}: JSON that cannot be read ({error})") from None
    return value, end
