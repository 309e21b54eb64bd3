"""Read the rows of a data file: JSON lines, one JSON array, CSV, TSV or Parquet, each but Parquet also gzipped."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from remend.data.json_stream import MAX_ROW_CHARACTERS, iterate_values, shorten
from remend.errors import RequestError
from remend.saved_folders import check_writable, unique_keys

GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\xfd7zX": "an xz file",
    b"BZh": "a bz2 file",
}
"""The first bytes of files that are refused by name."""
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
"""What may separate the cells of a table, by the ending of its name; some spreadsheets write semicolons in CSV."""
_LIST_OR_OBJECT = re.compile(r"\s*(?:\[\s*[\"'{].*\]|\{\s*[\"'].*\})\s*", re.DOTALL)
"""A cell that is a list of texts or objects, or an object, as JSON or as Python shows them."""
_LINE_BYTES = 32
"""What a line of a table counts beyond its own bytes, so that not many empty ones are read either."""
_PARQUET_BATCH, _PARQUET_BATCH_BYTES = 256, 1 << 26
"""How many rows of a Parquet file are unpacked together, and about how many bytes."""
MAX_GROUP_BYTES = 1 << 30
"""The largest group of rows of a Parquet file that is unpacked: a small file may hold one that fills all memory."""


def iterate_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, each with its place for messages (``data.csv, line 3``), counted from 1.

    Whether a file is gzipped or Parquet is seen from its first bytes; CSV and TSV are told by the name. An empty cell
    is an absent value, and a cell with a JSON list of texts or objects, or an object, is read as such.

    Raises:
        RequestError: the file cannot be read, or a row is broken; the message names its place.
    """
    try:
        with _opened(path) as file:
            start = file.read(4)
            file.seek(0)
            for magic, kind in _ARCHIVES.items():
                if start.startswith(magic):
                    raise RequestError(f"{path} is {kind}: unpack it, or compress the file with gzip")
            if start == PARQUET_MAGIC:
                yield from _parquet_rows(path)
            elif start.startswith(GZIP_MAGIC):
                with gzip.open(file) as unpacked:
                    yield from _text_rows(path, unpacked, Path(path.stem).suffix if path.suffix == ".gz" else "")
            elif b"\0" in start:
                raise RequestError(f"{path} holds no UTF-8 text: save requests as UTF-8, one JSON object a line")
            else:
                yield from _text_rows(path, file, path.suffix)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"{path} is a damaged gzip file ({error}): is it complete?") from None
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}; give a file of requests") from None


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except ValueError as error:  # it holds a null character, or one that no name of a file holds
        raise RequestError(f"cannot read {str(path)!r}: {error}; give a file of requests") from None


def _text_rows(path: Path, file: BinaryIO | gzip.GzipFile, suffix: str) -> Iterator[tuple[str, Any]]:
    if suffix.lower() not in _DELIMITERS:
        yield from iterate_values(path, file)
        return
    yield from _table_rows(_TableLines(path, file), _DELIMITERS[suffix.lower()])


class _TableLines:
    """The lines of a table.

    Attributes:
        number: the number of the line that was read last, from 1.
        size: the bytes that were read since it was last set to zero; too many are an error.
    """

    def __init__(self, path: Path, file: BinaryIO | gzip.GzipFile) -> None:
        self.path, self.file = path, file
        self.number = self.size = 0

    @property
    def where(self) -> str:
        """The file and its line, for messages."""
        return f"{self.path}, line {self.number}"

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(MAX_ROW_CHARACTERS):
            self.number += 1
            self.size += len(line) + _LINE_BYTES
            if self.size >= MAX_ROW_CHARACTERS:
                raise RequestError(
                    f"{self.where}: it is longer than {MAX_ROW_CHARACTERS:,} bytes; is this a file of requests?"
                )
            try:
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise RequestError(f"{self.where}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None


def _table_rows(lines: _TableLines, delimiters: str) -> Iterator[tuple[str, Any]]:
    every_line = iter(lines)
    header = next(every_line, "")
    delimiter = max(delimiters, key=header.count)
    reader = csv.reader(chain([header], every_line), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        if len(set(columns)) < len(columns):
            raise RequestError(f"{lines.where}: two columns have one name ({shorten(columns)})")
        for cells in filter(None, reader):
            lines.size = 0
            if len(cells) != len(columns):
                raise RequestError(
                    f"{lines.where}: there are {len(cells)} cells for {len(columns)} columns ({shorten(columns)}); put "
                    f"a text that holds {delimiter!r} between double quotes"
                )
            named = zip(columns, cells, strict=True)
            yield lines.where, {name: _cell_value(cell, f"{lines.where}, {name}") for name, cell in named if cell}
    except csv.Error as error:
        raise RequestError(f"{lines.where}: broken table ({error})") from None


def _cell_value(cell: str, where: str) -> Any:
    """Return a cell's text, or the list or object that it holds as JSON.

    Raises:
        RequestError: it looks like one, but is no JSON, so that it would be taken for a single text.
    """
    if not _LIST_OR_OBJECT.fullmatch(cell):
        return cell
    try:
        value = json.loads(cell, object_pairs_hook=unique_keys)
        check_writable(value)
    except (ValueError, RecursionError):
        raise RequestError(
            f'{where}: {shorten(cell)} looks like a list, but is not JSON; write it as ["…", "…"]'
        ) from None
    return value


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if find_spec("pyarrow") is None:
        raise RequestError(f"{path} is a Parquet file, which needs pyarrow: pip install 'remend[parquet]'")
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file, number = parquet.ParquetFile(path), 0
        groups = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
        if (largest := max(groups, default=0)) > MAX_GROUP_BYTES:
            raise RequestError(
                f"{path} holds a group of rows of {largest:,} bytes, and {MAX_GROUP_BYTES:,} are allowed: write "
                "it with smaller groups of rows"
            )
        for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata)):
            for index in range(batch.num_rows):
                number += 1
                where = f"{path}, row {number}"
                (row,) = _short_row(batch.slice(index, 1), where).to_pylist()
                yield where, {name: _json_value(value, f"{where}, {name}") for name, value in row.items()}
    except RequestError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{path} is a damaged Parquet file ({reason[:120]})") from None


def _rows_at_once(metadata: Any) -> int:
    """Return how many rows of a Parquet file may be unpacked together.

    A value that many rows share is stored once, in a dictionary, but unpacked for each of them.
    """
    columns = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    shared = [column.total_uncompressed_size for column in columns if column.has_dictionary_page]
    return max(1, min(_PARQUET_BATCH, _PARQUET_BATCH_BYTES // max(shared, default=1)))


def _short_row(row: Any, where: str) -> Any:
    """Return a row as it is.

    Raises:
        RequestError: it is longer than rows of other files may be.
    """
    if row.nbytes > MAX_ROW_CHARACTERS:
        raise RequestError(
            f"{where}: it holds {row.nbytes:,} bytes, and {MAX_ROW_CHARACTERS:,} are allowed; is this a file of "
            "requests?"
        )
    return row


def _json_value(value: Any, where: str) -> Any:
    """Return a value of a Parquet file as JSON has it: dates and decimals as texts, bytes as the text they hold.

    Raises:
        RequestError: bytes hold no text.
    """
    if isinstance(value, dict):
        return {name: _json_value(item, where) for name, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item, where) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise RequestError(f"{where}: bytes that are no UTF-8 text; leave this column out") from None
    return value if value is None or isinstance(value, str | int | float) else str(value)
