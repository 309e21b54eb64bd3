"""Read the rows of a data file: JSON lines, one JSON array, CSV, TSV or Parquet, each but Parquet also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from remend.data.json_stream import iterate_values
from remend.errors import RequestError

GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\xfd7zX": "an xz file",
    b"BZh": "a bz2 file",
}
"""The first bytes of files that are refused by name."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PARQUET_BATCH = 256


def iterate_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, each with its place for messages (``data.csv, line 3``), counted from 1.

    Whether a file is gzipped or Parquet is seen from its first bytes; CSV and TSV are told by the name. In their
    cells, nothing is an absent value, and a JSON list of texts or objects is read as such.

    Raises:
        RequestError: the file cannot be read, or a row is broken; the message names its place.
    """
    if "\0" in str(path):
        raise RequestError(f"cannot read {str(path)!r}: no name of a file holds a NUL")
    try:
        with path.open("rb") as file:
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
            else:
                yield from _text_rows(path, file, path.suffix)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"{path} is a damaged gzip file ({error}): is it complete?") from None
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}; give a file of requests") from None


def _text_rows(path: Path, file: BinaryIO | gzip.GzipFile, suffix: str) -> Iterator[tuple[str, Any]]:
    if suffix.lower() not in _DELIMITERS:
        yield from iterate_values(path, file)
        return
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        yield from _table_rows(path, text, _DELIMITERS[suffix.lower()])


def _table_rows(path: Path, text: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        columns = list(reader.fieldnames or ())
        if len(set(columns)) < len(columns):
            raise RequestError(f"{path}, line 1: two columns have one name ({', '.join(columns)})")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if None in cells:
                raise RequestError(
                    f"{where}: there are more cells than columns ({', '.join(columns)}); put a text that holds "
                    f"{delimiter!r} between double quotes"
                )
            yield where, {name: _cell_value(cell) for name, cell in cells.items() if cell}
    except csv.Error as error:
        raise RequestError(f"{path}, line {reader.line_num}: broken table ({error})") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise RequestError(
            f"{path}, line {reader.line_num + 1}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _cell_value(cell: str) -> Any:
    """Return a cell's text, or the list that it holds as JSON."""
    if not cell.lstrip().startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    # "[1]" may be a text; a list of texts or of objects is one of phrasings or probes.
    return value if value and all(isinstance(item, str | dict) for item in value) else cell


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if find_spec("pyarrow") is None:
        raise RequestError(f"{path} is a Parquet file, which needs pyarrow: pip install 'remend[parquet]'")
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file, number = parquet.ParquetFile(path), 0
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{path} is a damaged Parquet file ({reason[:120]})") from None
