"""What an evaluation has found so far, on disk, so that one that was stopped can go on."""

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
from transformers import PreTrainedModel

from remend.core.operators import SymmetricOperator
from remend.editors.edit_types import AnyEdit, load_edit
from remend.editors.protocol import Editor
from remend.errors import FileError
from remend.request import EditRequest
from remend.serialization import write_json

SAMPLED = 256
"""Values of each parameter that a model is told by."""


class EvaluationCheckpoint:
    """A folder that keeps one JSON object for each finished part of an evaluation; without a folder, nothing is kept.

    Args:
        folder: where; None to keep nothing.
        about: what the evaluation is of. A folder that is about something else is refused.
        resume: whether to go on with what is there; otherwise it is removed first.

    Raises:
        FileError: the folder is of another evaluation, or holds something else.
    """

    def __init__(self, folder: Path | None, about: str = "", resume: bool = False) -> None:
        self.folder = folder
        if folder is None:
            return
        known = folder / "about.json"
        if folder.exists() and not known.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileError(f"{folder} holds something else than a stopped evaluation: it is left alone; name another")
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not known.exists():
            write_json(known, {"about": about})
        elif json.loads(known.read_text(encoding="utf-8")) != {"about": about}:
            raise FileError(
                f"{folder} is of an evaluation with another model, editor, data or settings: give the same ones, or "
                "leave --resume away to begin anew"
            )

    def find(self, part: str) -> Any | None:
        """What was kept of a part, or None."""
        if self.folder is None or not (file := self._file(part)).exists():
            return None
        return json.loads(file.read_text(encoding="utf-8"))

    def keep(self, part: str, found: Any) -> None:
        """Keep what was found, whole or not at all."""
        if self.folder is not None:
            write_json(self._file(part), found)

    def find_edit(self, number: int) -> AnyEdit | None:
        """The edit that was kept under a number."""
        return None if self.folder is None else load_edit(self.folder / f"edit-{number}")

    def keep_edit(self, number: int, edit: AnyEdit) -> None:
        """Keep an edit; after the part that it belongs to is kept, it can be gone on from."""
        if self.folder is not None:
            edit.save(self.folder / f"edit-{number}")

    def close(self) -> None:
        """The evaluation is done: remove the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder)

    def _file(self, part: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{part}.json"


def about(model: PreTrainedModel, editor: Editor, requests: Sequence[EditRequest], settings: dict[str, Any]) -> str:
    """A short name for an evaluation: the same model, editor, requests and settings give the same."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for request in requests:
        found.update(json.dumps(request.to_json(), sort_keys=True).encode())
    found.update(type(editor).__qualname__.encode())
    _note(found, model.state_dict())
    _note(found, editor.state_dict() if isinstance(editor, nn.Module) else {})
    _note(found, vars(editor))
    return found.hexdigest()


def _note(found: Any, state: Mapping[str, Any]) -> None:
    """Add what something is made of: settings and measured numbers as they are written, tensors by a sample."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            found.update(f"{name} {tuple(value.shape)}".encode())
            if value.numel() and not value.is_meta:
                found.update(str(value.flatten()[:SAMPLED].to("cpu", torch.float64).tolist()).encode())
        elif isinstance(value, Mapping):
            _note(found, {f"{name} {key}": own for key, own in value.items()})
        elif isinstance(value, SymmetricOperator):
            _note(found, {f"{name} {key}": own for key, own in vars(value).items()})
        elif isinstance(value, float | list | tuple) or is_dataclass(value):
            found.update(f"{name} {value!r}".encode())
