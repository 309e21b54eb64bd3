"""``EvaluationCheckpoint``: the finished parts of an evaluation on disk, so that one that was stopped can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remend.core.operators import SymmetricOperator
from remend.editors.base import EditorLike
from remend.editors.edit_types import AnyEdit, load_edit
from remend.errors import FileError
from remend.request import EditRequest
from remend.serialization import write_json

HASHED_VALUES = 256
"""Values of each tensor that enter the fingerprint: enough to tell models apart, without reading all weights."""


class EvaluationCheckpoint:
    """A folder with one JSON object for each finished part of an evaluation; without a folder, nothing is stored.

    Args:
        folder: where; None to store nothing.
        fingerprint: what the evaluation is of (:func:`evaluation_fingerprint`). A folder with another one is refused.
        resume: whether to go on with what is there; otherwise it is removed first.

    Raises:
        FileError: the folder is of another evaluation, or holds something else.
    """

    def __init__(self, folder: Path | None, fingerprint: str = "", resume: bool = False) -> None:
        self.folder = folder
        if folder is None:
            return
        about = folder / "about.json"
        if folder.exists() and not about.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileError(
                f"{folder} holds something else than a stopped evaluation and is not touched: name another one"
            )
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Without about.json a folder is not taken for a checkpoint, so it is written before any part.
        if not about.exists():
            write_json(about, {"about": fingerprint})
        elif json.loads(about.read_text(encoding="utf-8")) != {"about": fingerprint}:
            raise FileError(
                f"{folder} is of an evaluation with another model, editor, data or settings: give the same ones, or "
                "omit --resume to start again"
            )

    def load_part(self, name: str) -> Any | None:
        """Return what was stored for a part, or None."""
        if self.folder is None or not (file := self._file(name)).exists():
            return None
        return json.loads(file.read_text(encoding="utf-8"))

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
            shutil.rmtree(self.folder)

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.json"


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
