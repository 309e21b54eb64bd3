"""Read and write saved edits and editors: folders of a manifest (JSON) and tensors (safetensors), written atomically.

Nothing is ever unpickled, and no path is read from a file: both file names are fixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from remend.errors import FileError, nearest
from remend.staging import NEW, readable_write_errors, remove_abandoned, rename_folder, staging_folder

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
MAX_JSON_DEPTH = 100
"""The deepest nesting of a JSON document that is read."""
HUB_PREFIX = "hf:"
"""How the name of a folder on the Hugging Face hub begins: ``hf:owner/name``, or ``hf:owner/name@revision``."""


def is_saved_by_remend(path: Path) -> bool:
    """Return whether a folder holds nothing but what :func:`write_folder` wrote."""
    if not {entry.name for entry in path.iterdir()} <= {MANIFEST, TENSORS}:
        return False
    try:
        manifest = parse_json((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and str(manifest.get("format")).startswith("remend.")


def write_folder(path: str | Path, kind: str, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a folder of a manifest and tensors atomically and return its path.

    A crash leaves the old content or the new. A folder that holds anything that remend did not write is never replaced.

    Args:
        path: the folder.
        kind: its format, such as ``remend.edit/1``.
        manifest: the manifest, without format and checksum.
        tensors: the tensors by name.

    Raises:
        FileError: ``path`` holds something else, or cannot be written.
    """
    with atomic_folder(path) as staged:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, staged / TENSORS)
        content = {"format": kind, "sha256": {TENSORS: file_sha256(staged / TENSORS)}, **manifest}
        (staged / MANIFEST).write_text(format_json(content), encoding="utf-8")
    return Path(path)


def remove_saved(path: Path) -> None:
    """Remove what :func:`write_folder` wrote to a folder, and the folder if it holds nothing else.

    What cannot be removed is left.
    """
    with contextlib.suppress(OSError):
        (path / TENSORS).unlink(missing_ok=True)
        (path / MANIFEST).unlink(missing_ok=True)
        path.rmdir()


@contextlib.contextmanager
def atomic_folder(path: str | Path, replaceable: Callable[[Path], bool] = is_saved_by_remend) -> Iterator[Path]:
    """Yield a temporary folder to fill, and rename it to ``path`` when all of it is on disk.

    After an exception the temporary folder is deleted, and ``path`` is as it was.

    Args:
        path: the final name.
        replaceable: whether a folder that exists under that name may be replaced; by default one that
            :func:`write_folder` wrote.

    Raises:
        FileError: something else exists under that name, or it cannot be written.
    """
    check_replaceable(path, replaceable)
    target = Path(os.path.realpath(path))  # a link keeps leading to the folder
    with readable_write_errors(path), staging_folder(target.parent) as staging:
        (staged := staging / NEW).mkdir()
        yield staged
        # Renaming before the content is on disk could leave empty files under the final name after a crash.
        for file in filter(Path.is_file, staged.rglob("*")):
            file.chmod(staged.stat().st_mode & 0o666)  # safetensors lets nobody else read
            _flush_to_disk(file)
        check_replaceable(path, replaceable)  # it may have been filled meanwhile
        rename_folder(staged, target)


def check_replaceable(path: str | Path, replaceable: Callable[[Path], bool] = is_saved_by_remend) -> None:
    """Raise if a folder cannot be written at ``path`` without replacing something of the user; call before long work.

    Only an empty folder, or one for which ``replaceable`` is true (by default, nothing but a manifest and tensors that
    remend wrote), may be replaced.

    Raises:
        FileError: something else is there, or the folder above cannot be written to.
    """
    check_path(path)
    with readable_write_errors(path):
        path = Path(path)
        remove_abandoned(path.absolute().parent)
        if not path.exists():
            above = next(parent for parent in path.absolute().parents if parent.exists())
            if not above.is_dir() or not os.access(above, os.W_OK):
                raise FileError(f"cannot write {path}: {above} is not a folder one can write to; choose another place")
            return
        if not path.is_dir():
            raise FileError(f"{path} is a file; choose a folder, or a name that is free")
        names = {entry.name for entry in path.iterdir()}
        if names and not replaceable(path):
            raise FileError(
                f"{path} holds {', '.join(sorted(names)[:3])}, not just what remend wrote; it was left alone. "
                "Choose another folder"
            )


def read_format(path: str | Path) -> str:
    """Return the format that a folder's manifest gives; empty where there is none that can be read.

    :func:`read_manifest` raises an error that says why.
    """
    folder = resolve_folder(path)
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    return str(manifest.get("format")) if isinstance(manifest, dict) else ""


def read_manifest(path: str | Path, kind: str, *newer: str) -> dict[str, Any]:
    """Return the manifest of a folder that :func:`write_folder` wrote; its format is checked, the tensors are not.

    Args:
        path: the folder.
        kind: the format that it should have.
        newer: other versions of it that are read too.

    Raises:
        FileError: there is no such folder, the manifest is not JSON, or it is of another kind or version.
    """
    path = resolve_folder(path)
    file = path / MANIFEST
    if not file.is_file():
        raise FileError(f"{path} is not a folder saved by remend: it has no {MANIFEST}")
    try:
        manifest = parse_json(file.read_bytes())
    except OSError as error:
        raise FileError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file} is damaged, it is not JSON ({error}); save or fetch it again") from None
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if str(written).partition("/")[0] != kind.partition("/")[0] and str(written).startswith("remend."):
        raise FileError(
            f"{path} holds a {written}, not a {kind}: this reads weights' changes or editors of them. What a cache or "
            "in-context made is read by remend.editors.load_edit"
        )
    if written not in (kind, *newer):
        raise FileError(f"{file} says format {written!r}; this version of remend reads {kind!r} here")
    assert isinstance(manifest, dict)
    return manifest


def read_folder(path: str | Path, kind: str, *newer: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return manifest and tensors of a folder that :func:`write_folder` wrote.

    The arguments are those of :func:`read_manifest`.

    Raises:
        FileError: as :func:`read_manifest`, or the tensors are missing, truncated or not those of the manifest.
    """
    path = resolve_folder(path)
    manifest = read_manifest(path, kind, *newer)
    file = path / TENSORS
    if not file.is_file():
        raise FileError(f"{path} is incomplete: {TENSORS} is missing")
    sums = manifest.get("sha256")
    try:
        found = file_sha256(file)
    except OSError as error:
        raise FileError(f"cannot read {file}: {error.strerror}") from None
    if found != (sums.get(TENSORS) if isinstance(sums, dict) else None):
        raise FileError(f"{file} is not what {MANIFEST} describes (sha256 differs): truncated or altered")
    return manifest, read_tensors(file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file of unknown origin into memory, so that what happens to the file later does not matter.

    Raises:
        FileError: it is missing or damaged, or holds tensors of an unknown dtype.
    """
    try:
        # Copied: a mapped file that is truncated ends the process, and its tensors are not aligned as torch's own are.
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise FileError(f"{file} is not a safetensors file that can be read ({error})") from None


def read_verified_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a folder of any format of remend, after checking the tensors against it.

    Raises:
        FileError: as :func:`read_folder`.
    """
    kind = read_format(path)
    return read_folder(path, kind if kind.startswith("remend.") else "remend.edit/1")[0]


def resolve_folder(path: str | Path) -> Path:
    """Return a local folder: ``path`` itself, or what ``hf:owner/name`` names, downloaded if it is not in the cache.

    Raises:
        FileError: it cannot be downloaded.
    """
    if not str(path).startswith(HUB_PREFIX):
        check_path(path)
        path = Path(path)
        if not path.exists() and os.access(path.parent, os.W_OK):
            with readable_write_errors(path):
                remove_abandoned(path.parent)  # a process may have been killed while it replaced the folder
        return path
    match = re.fullmatch(r"(\w[\w.\-]*/\w[\w.\-]*)(?:@([\w.\-/]+))?", str(path).removeprefix(HUB_PREFIX))
    if match is None:
        raise FileError(
            f"{path} is no folder on the hub: write {HUB_PREFIX}owner/name, or {HUB_PREFIX}owner/name@revision"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=[MANIFEST, TENSORS]))
    except hub_errors() as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(f"cannot fetch {path}: {reason}") from None


def check_path(path: str | Path) -> None:
    """Raise where the system cannot look at a path; one where nothing is does no harm.

    Raises:
        FileError: it is too long, lies in a folder that may not be read, or is no path at all.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise FileError(f"cannot use the path {str(path)[:200]}: {error.strerror}") from None
    except ValueError as error:  # it holds a null character, or none that a file's name can hold
        raise FileError(f"cannot use the path {str(path)[:200]!r}: {error}") from None


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors that ``huggingface_hub`` raises without network, repository, or permission."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its first base is that of all errors of the HTTP library, which is another one in other releases.
    return (*HfHubHTTPError.__bases__, OSError, ValueError)


def parse_json(content: bytes) -> Any:
    """Parse a JSON document of unknown origin as the standard defines it (RFC 8259), so that it can be written again.

    Python's parser accepts more: NaN, infinities, unpaired surrogates, which no UTF-8 file can hold, and keys that are
    given twice, of which it takes the last.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deep.
    """

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no number")

    def finite_float(digits: str) -> float:
        return float(digits) if abs(float(digits)) < float("inf") else refuse(digits)

    document = json.loads(content, parse_constant=refuse, parse_float=finite_float, object_pairs_hook=unique_keys)
    check_writable(document)
    return document


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, for a decoder's ``object_pairs_hook``, which would take the last of equal keys.

    Raises:
        ValueError: a key is given twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{repeated[:80]!r} is given twice")
    return values


def check_writable(document: object) -> None:
    """Raise where a decoded JSON document cannot be written again.

    Raises:
        ValueError: it holds unpaired surrogates, which no UTF-8 file can hold, or is nested too deep.
    """
    values = [document]
    for _ in range(MAX_JSON_DEPTH):
        containers = [value for value in values if isinstance(value, dict | list)]
        values = [value for held in containers for value in (held.values() if isinstance(held, dict) else held)]
        if not values:
            json.dumps(document, ensure_ascii=False).encode()  # raises UnicodeEncodeError, a ValueError, at surrogates
            return
    raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")


def get_field(manifest: Mapping[str, Any], key: str, kind: type, where: str | Path) -> Any:
    """Return ``manifest[key]``.

    Args:
        manifest: the manifest.
        key: the key.
        kind: the class that the value must have.
        where: the file or folder, for messages.

    Raises:
        FileError: the key is missing, or its value is of another class.
    """
    if key not in manifest:
        raise FileError(f"{where}: the manifest has no {key!r}; {nearest(key, manifest)}")
    value = manifest[key]
    if not isinstance(value, kind):
        raise FileError(f"{where}: {key!r} should be {kind.__name__}, it is {type(value).__name__}")
    return value


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically.

    Raises:
        FileError: it cannot be written there.
    """
    write_text(path, format_json(content))


def format_json(content: Mapping[str, Any]) -> str:
    """Format a JSON object as remend writes it, indented for people."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) atomically.

    Raises:
        FileError: it cannot be written there.
    """
    with atomic_file(path) as file:
        file.write(text)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        FileError: it cannot be written there.
    """
    with _staged_file(path) as staged:
        staged.write_bytes(content)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[TextIO]:
    """Yield a temporary text file (UTF-8) to write, and rename it to ``path`` when all of it is on disk.

    After an exception the temporary file is deleted, and ``path`` is as it was.

    Raises:
        FileError: it cannot be written there.
    """
    with _staged_file(path) as staged, staged.open("w", encoding="utf-8", newline="\n") as file:
        yield file


@contextlib.contextmanager
def _staged_file(path: str | Path) -> Iterator[Path]:
    """Yield the name of a temporary file to write, which is then renamed to ``path``."""
    check_path(path)
    target = Path(os.path.realpath(path))
    with readable_write_errors(path):
        if target.exists() and not target.is_file():  # a pipe or a device, which is written to and not replaced
            yield target
            return
        with staging_folder(target.parent) as staging:
            yield staging / NEW
            _flush_to_disk(staging / NEW)
            (staging / NEW).replace(target)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    """Wait until the content of a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
