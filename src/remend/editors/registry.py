"""Every editor by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from remend.editors.enn import Enn
from remend.editors.finetune import FineTune, FineTuneLocal
from remend.editors.in_context import InContext
from remend.editors.ke import Ke
from remend.editors.locate_then_edit.base import LocateThenEdit
from remend.editors.locate_then_edit.editors import Memit, Rome
from remend.editors.lookup import Lookup
from remend.editors.mend.editor import Mend
from remend.editors.protocol import Editor
from remend.editors.ridge import Ridge
from remend.editors.serialization import FORMAT
from remend.editors.trainable import TrainableEditor
from remend.errors import ConfigError, FileError, nearest
from remend.serialization import read_manifest
from remend.tasks import Task

Trainable = Mend | TrainableEditor

TRAINED: dict[str, type[Mend] | type[TrainableEditor]] = {"mend": Mend, "ke": Ke, "enn": Enn}
"""Those that are trained before their first edit."""

UNTRAINED: dict[str, type[Any]] = {
    kind.traits.name: kind for kind in (Ridge, FineTune, FineTuneLocal, Rome, Memit, Lookup, InContext)
}
"""Those that can edit any model at once."""

EDITORS: dict[str, type[Any]] = {**TRAINED, **UNTRAINED}
"""All of them."""

STORED: dict[str, type[Any]] = {
    **TRAINED,
    **{name: kind for name, kind in UNTRAINED.items() if issubclass(kind, LocateThenEdit)},
}
"""Those that are kept in folders: what they learnt or measured takes a while."""


def make(
    name: str,
    task: Task,
    text: Sequence[str] = (),
    seed: int = 0,
    config: Any = None,
) -> Editor:
    """An editor that needs no training, for a model.

    Args:
        name: one of :data:`UNTRAINED`.
        task: the base model.
        text: passages of ordinary text, for those that measure what the model reads.
        seed: of whatever is drawn.
        config: the editor's settings; its own default without. ``in-context`` has none.

    Raises:
        ConfigError: there is no such editor, or it needs something that is missing.
        ModelError: there is nothing in the model that it could edit.
    """
    if name in TRAINED:
        raise ConfigError(
            f"{name} is trained before its first edit: remend train … --method {name} --out DIR, then DIR"
        )
    if name not in UNTRAINED:
        raise ConfigError(f"there is no editor {name!r}, nor a folder of that name; {nearest(name, UNTRAINED)}")
    if isinstance(text, str):
        raise ConfigError(
            "text is a list of passages, and was given one string: [text], or remend.data.read_text(FILE)"
        )
    kind = UNTRAINED[name]
    if kind.traits.needs == "text" and not text:
        raise ConfigError(f"{name} measures what the model reads on a text: give text=[…], or --statistics FILE")
    if config is None and issubclass(kind, FineTune):
        config = replace(kind.default(), seed=seed)
    found: Editor = kind.create(task, config, text=text, seed=seed)
    return found


def load_editor(path: str | Path) -> Trainable | LocateThenEdit:
    """The editor that a folder holds, of whatever kind.

    Raises:
        FileError: the folder is missing, damaged, altered, of an unknown version, or of an unknown kind.
    """
    kind = read_manifest(path, FORMAT).get("editor")
    if kind not in STORED:
        raise FileError(f"{path} holds an editor of the kind {kind!r}; this release knows {', '.join(STORED)}")
    found: Trainable | LocateThenEdit = STORED[kind].from_pretrained(path)
    return found


def load_trained(path: str | Path) -> Trainable:
    """The trained editor that a folder holds.

    Raises:
        FileError: as :func:`load_editor`; or the editor there is of a kind that is not trained.
    """
    found = load_editor(path)
    if not isinstance(found, Trainable):
        raise FileError(f"{path} holds the editor {found.traits.name!r}, which is not trained; load_editor reads it")
    return found
