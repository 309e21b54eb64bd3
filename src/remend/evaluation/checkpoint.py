"""``EvaluationCheckpoint``: the finished parts of an evaluation on disk, so that one that was stopped can go on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remend.core.symmetric_operator import SymmetricOperator
from remend.editors.base import EditorLike
from remend.editors.edit_types import AnyEdit, load_edit
from remend.errors import FileError
from remend.request import EditRequest
from remend.saved_folders import parse_json, remove_saved, write_json
from remend.staging import readable_write_errors, remove_abandoned

ABOUT = "about.json"
_PART = re.compile(r"about\.json|(single|batched|baselines)(-\d+)+\.json|after-\d+\.json|general-\w+\.json|edit-\d+")
"""The names of what is stored: which evaluation it is, the results of parts, and edits."""

HASHED_VALUES = 256
"""Values of each tensor that enter the fingerprint: enough to tell models apart, without reading all weights."""


class EvaluationCheckpoint:
    """A folder with one JSON object for each finished part of an evaluation; without a folder, nothing is stored.

    Args:
        folder: where; None to store nothing.
        fingerprint: what the evaluation is of (:func:`evaluation_fingerprint`). A folder with another one is refused.
        resume: whether to go on with what is there; otherwise the parts are removed first.

    Raises:
        FileError: the folder is of another evaluation, or holds something else.
    """

    def __init__(self, folder: Path | None, fingerprint: str = "", resume: bool = False) -> None:
        self.folder = folder
        if folder is None:
            return
        about = folder / ABOUT
        if others := others_content(folder):
            raise FileError(
                f"{folder} holds something else than parts of a stopped evaluation ({', '.join(others[:3])}) and is "
                "not touched: move it elsewhere, or name another report"
            )
        if not resume:
            remove_parts(folder)
        # Without about.json a folder is not taken for a checkpoint, so it is written before any part.
        if not about.exists():
            write_json(about, {"about": fingerprint})
        elif _read_json(about) != {"about": fingerprint}:
            raise FileError(
                f"{folder} is of an evaluation with another model, editor, data or settings: give the same ones, or "
                "omit --resume to start again"
            )

    def load_part(self, name: str) -> Any | None:
        """Return what was stored for a part, or None."""
        if self.folder is None or not (file := self._file(name)).exists():
            return None
        return _read_json(file)

    def save_part(self, name: str, part: Any) -> None:
        """Store the result of a part, whole or not at all."""
        if self.folder is not None:
            write_json(self._file(name), part)

    def load_edit(self, number: int) -> AnyEdit | None:
        """Return the edit that was stored under a number."""
        return None if self.folder is None else load_edit(self.folder / f"edit-{number}")

    def save_edit(self, number: int, edit: AnyEdit) -> None:
        """Store an edit from which a sequence goes on."""
        if self.folder is not None:
            edit.save(self.folder / f"edit-{number}")

    def remove(self) -> None:
        """Remove the folder, once the evaluation is done."""
        if self.folder is not None:
            remove_parts(self.folder)

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.json"


def others_content(folder: Path) -> list[str]:
    """Return what a folder holds that is no part of a stopped evaluation; the folder need not exist.

    Raises:
        FileError: there is a file of that name, or the folder cannot be read.
    """
    with readable_write_errors(folder):
        if not os.path.lexists(folder):
            return []
        remove_abandoned(folder)
        names = sorted(entry.name for entry in folder.iterdir())
    if not names or _is_about(folder / ABOUT):
        return [name for name in names if not _PART.fullmatch(name)]
    return names


def remove_parts(folder: Path) -> None:
    """Remove the parts of a stopped evaluation, and their folder if it holds nothing else.

    Raises:
        FileError: they cannot be removed.
    """
    if others_content(folder) or not os.path.lexists(folder):
        return
    with readable_write_errors(folder):
        # about.json last: without it, nobody could tell what the rest is.
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == ABOUT):
            if entry.is_dir():
                remove_saved(entry)
            else:
                entry.unlink()
        folder.rmdir()


def _is_about(file: Path) -> bool:
    """Return whether a file is the one that says which evaluation a folder is of."""
    try:
        about = _read_json(file)
    except FileError:
        return False
    return isinstance(about, dict) and about.keys() == {"about"} and isinstance(about["about"], str)


def _read_json(file: Path) -> Any:
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(
            f"{file} cannot be read ({error}): omit --resume to start again, or restore it from a copy"
        ) from None


def evaluation_fingerprint(
    model: nn.Module, editor: EditorLike, requests: Sequence[EditRequest], settings: dict[str, Any]
) -> str:
    """Return a hash of an evaluation: the same model, editor, requests and settings give the same."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for request in requests:
        digest.update(json.dumps(request.to_json(), sort_keys=True).encode())
    digest.update(type(editor).__qualname__.encode())
    _update(digest, model.state_dict())
    # What an editor measured is not always in its state dict, so all of its attributes count too.
    _update(digest, editor.state_dict() if isinstance(editor, nn.Module) else {})
    _update(digest, vars(editor))
    return digest.hexdigest()


def _update(digest: Any, state: Mapping[str, Any]) -> None:
    """Hash named values: settings and measured numbers as they are written, tensors by their first values."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            # In float64, in which every dtype of weights has one text; meta tensors are weights on the disk.
            digest.update(f"{name} {tuple(value.shape)}".encode())
            if value.numel() and not value.is_meta:
                values = value.flatten()[:HASHED_VALUES].to("cpu", torch.float64).tolist()
                digest.update(str(values).encode())
        elif isinstance(value, Mapping):
            _update(digest, {f"{name} {key}": entry for key, entry in value.items()})
        elif isinstance(value, SymmetricOperator):
            _update(digest, {f"{name} {key}": entry for key, entry in vars(value).items()})
        elif isinstance(value, float | list | tuple) or is_dataclass(value):
            digest.update(f"{name} {value!r}".encode())
