"""Folders of one manifest (JSON) and one file of tensors (safetensors), written whole or not at all.

Nothing here is ever unpickled, and no path is read from a file: both names are fixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from remend.errors import FileError, nearest

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
HUB_PREFIX = "hf:"
"""What begins the name of a folder on the Hugging Face hub: ``hf:owner/name``, or ``hf:owner/name@revision``."""


def _ours(path: Path) -> bool:
    """Whether a folder holds nothing but what :func:`write_folder` wrote."""
    if not {entry.name for entry in path.iterdir()} <= {MANIFEST, TENSORS}:
        return False
    try:
        found = parse_json((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and str(found.get("format")).startswith("remend.")


def write_folder(path: str | Path, kind: str, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a folder of this ``kind`` (such as ``remend.edit/1``) and return its path.

    Everything is written to a folder beside it that then takes its name, so a crash leaves the old content or the new.
    A folder that holds something else than a manifest of ours is never replaced.

    Raises:
        FileError: ``path`` holds something else, or cannot be written.
    """
    with atomic_folder(path) as staged:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, staged / TENSORS)
        content = {"format": kind, "sha256": {TENSORS: file_sha256(staged / TENSORS)}, **manifest}
        (staged / MANIFEST).write_text(format_json(content), encoding="utf-8")
    return Path(path)


@contextlib.contextmanager
def atomic_folder(path: str | Path, ours: Callable[[Path], bool] = _ours) -> Iterator[Path]:
    """A folder to fill that takes its name only when all of it is on disk; after an exception it is gone.

    Args:
        path: the name that it will have.
        ours: whether what stands there already may be replaced; by default what :func:`write_folder` wrote.

    Raises:
        FileError: something else stands there, or it cannot be written.
    """
    path = Path(path)
    check_replaceable(path, ours)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}; choose another place") from None
    try:
        yield staged
        for file in filter(Path.is_file, staged.rglob("*")):
            _sync(file)
        staged.chmod(0o777 & ~_umask())
        _take_name(staged, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"cannot write {path}: {reason}; what stood there before still does") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_replaceable(path: str | Path, ours: Callable[[Path], bool] = _ours) -> None:
    """Refuse a place where something stands that is not ours to replace; call it before long work.

    Only an empty folder, or one that is ``ours`` (nothing but a manifest and tensors that remend wrote), may be
    replaced.

    Raises:
        FileError: there is something else.
    """
    path = Path(path)
    if not path.exists():
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise FileError(f"cannot write {path}: {above} is not a folder one can write to; choose another place")
        return
    if not path.is_dir():
        raise FileError(f"{path} is a file; choose a folder, or a name that is free")
    names = {entry.name for entry in path.iterdir()}
    if names and not ours(path):
        raise FileError(
            f"{path} holds {', '.join(sorted(names)[:3])}, not just what remend wrote; it was left alone. "
            "Choose another folder"
        )


def remove_temporary_folders(folder: Path) -> None:
    """Delete what a process that was killed while writing into ``folder`` left behind under temporary names."""
    for entry in folder.glob(".*"):
        if entry.is_dir() and any((entry / name).exists() for name in (MANIFEST, TENSORS, "replaced")):
            shutil.rmtree(entry, ignore_errors=True)


def read_format(path: str | Path) -> str:
    """What a folder's manifest says that it is; empty where it has none, which :func:`read_manifest` explains."""
    try:
        found = parse_json((resolve_folder(path) / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    return str(found.get("format")) if isinstance(found, dict) else ""


def read_manifest(path: str | Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder written by :func:`write_folder`, checked for its kind but not against the tensors.

    Raises:
        FileError: there is no such folder, the manifest is not JSON, or it is of another kind or version.
    """
    path = resolve_folder(path)
    file = path / MANIFEST
    if not file.is_file():
        raise FileError(f"{path} is not a folder saved by remend: it has no {MANIFEST}")
    try:
        manifest = parse_json(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file} is damaged, it is not JSON ({error}); save or fetch it again") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if str(found).partition("/")[0] != kind.partition("/")[0] and str(found).startswith("remend."):
        raise FileError(
            f"{path} holds a {found}, not a {kind}: this reads weights' changes or editors of them. What a cache or "
            "in-context made is read by remend.editors.load_edit"
        )
    if found != kind:
        raise FileError(f"{file} says format {found!r}; this version of remend reads {kind!r} here")
    assert isinstance(manifest, dict)
    return manifest


def read_folder(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a folder written by :func:`write_folder`; the tensors are mapped, not yet read.

    Raises:
        FileError: as :func:`read_manifest`, or the tensors are missing, truncated or not those of the manifest.
    """
    path = resolve_folder(path)
    manifest = read_manifest(path, kind)
    file = path / TENSORS
    if not file.is_file():
        raise FileError(f"{path} is incomplete: {TENSORS} is missing")
    sums = manifest.get("sha256")
    if file_sha256(file) != (sums.get(TENSORS) if isinstance(sums, dict) else None):
        raise FileError(f"{file} is not what {MANIFEST} describes (sha256 differs): truncated or altered")
    try:
        return manifest, load_file(file)
    except safetensors.SafetensorError as error:
        raise FileError(f"{file} is not a safetensors file ({error})") from None


def read_verified_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a folder of whatever kind, with whose tensors all is well.

    Raises:
        FileError: as :func:`read_folder`.
    """
    kind = read_format(path)
    return read_folder(path, kind if kind.startswith("remend.") else "remend.edit/1")[0]


def resolve_folder(path: str | Path) -> Path:
    """A folder on this machine: the one that is named, or what :data:`HUB_PREFIX` names, fetched if it is not here yet.

    Raises:
        FileError: the hub does not give it.
    """
    if not str(path).startswith(HUB_PREFIX):
        return Path(path)
    found = re.fullmatch(r"(\w[\w.\-]*/\w[\w.\-]*)(?:@([\w.\-/]+))?", str(path).removeprefix(HUB_PREFIX))
    if found is None:
        raise FileError(
            f"{path} is no folder on the hub: write {HUB_PREFIX}owner/name, or {HUB_PREFIX}owner/name@revision"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(found[1], revision=found[2], allow_patterns=[MANIFEST, TENSORS]))
    except hub_errors() as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(f"cannot fetch {path}: {reason}") from None


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises where there is no network, no such repository, or no right to it."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError)  # its first base is that of all errors of its transport


def parse_json(content: bytes) -> Any:
    """What a JSON document of unknown origin says, as the standard has it (RFC 8259), so that it can be written again.

    Python's own reader takes more: NaN, infinities, and halves of characters, which no UTF-8 file can hold.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deep.
    """

    def refused(constant: str) -> float:
        raise ValueError(f"{constant} is no number")

    def finite(digits: str) -> float:
        return float(digits) if abs(float(digits)) < float("inf") else refused(digits)

    found = json.loads(content, parse_constant=refused, parse_float=finite)
    json.dumps(found, ensure_ascii=False).encode()
    return found


def get_field(manifest: Mapping[str, Any], key: str, kind: type, where: str | Path) -> Any:
    """``manifest[key]``, or a :class:`FileError` that says what is wrong with it."""
    if key not in manifest:
        raise FileError(f"{where}: the manifest has no {key!r}; {nearest(key, manifest)}")
    value = manifest[key]
    if not isinstance(value, kind):
        raise FileError(f"{where}: {key!r} should be {kind.__name__}, it is {type(value).__name__}")
    return value


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write one JSON file under a temporary name, then rename it.

    Raises:
        FileError: it cannot be written there.
    """
    write_text(path, format_json(content))


def format_json(content: Mapping[str, Any]) -> str:
    """JSON as remend writes it: for people too."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: str | Path, text: str) -> None:
    """Write one text file (UTF-8) under a temporary name, then rename it.

    Raises:
        FileError: it cannot be written there.
    """
    with atomic_file(path) as file:
        file.write(text)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[TextIO]:
    """A text file to write that takes its name only when all of it is on disk; after an exception it is gone.

    Raises:
        FileError: it cannot be written there.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}; choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file is safely on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _take_name(staged: Path, path: Path) -> None:
    """Rename ``staged`` to ``path``; a folder that stands there moves aside, and goes when the new one is in place."""
    if not path.exists():
        staged.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(aside / "replaced")
    try:
        staged.rename(path)
    except BaseException:
        (aside / "replaced").rename(path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
