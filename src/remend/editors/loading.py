"""Make an editor by its name, and read one from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remend.editors.base import Editor
from remend.editors.saved_editor import EDITOR_FORMAT, editor_folder
from remend.editors.trainable import TrainableEditor
from remend.errors import ConfigError, FileError, nearest
from remend.registries import EDITORS
from remend.saved_folders import read_manifest
from remend.tasks.base import Task

RENAMED = {"cache": "lookup"}
"""Editors that had another name: the old one, which files may hold, and the present one."""


def editor_class(name: str) -> type[Editor]:
    """Return the class of an editor.

    Raises:
        ConfigError: there is no editor of that name.
        RegistryError: its package cannot be imported.
    """
    if name in RENAMED:
        raise ConfigError(f"the editor {name!r} is called {RENAMED[name]!r} now")
    if name not in EDITORS:
        raise ConfigError(f"there is no editor {name!r}, nor a folder of that name; {nearest(name, EDITORS.names())}")
    loaded: type[Editor] = EDITORS.load(name)
    return loaded


def trainable_class(name: str) -> type[TrainableEditor]:
    """Return the class of an editor that is trained before its first edit.

    Raises:
        ConfigError: no such editor is trained.
    """
    if name not in EDITORS or EDITORS.get(name).needs != "training":
        raise ConfigError(f"there is no method {name!r}; {nearest(name, trained_names())}")
    loaded: type[TrainableEditor] = EDITORS.load(name)
    return loaded


def trained_names() -> list[str]:
    """Return the names of remend's editors that are trained before their first edit."""
    return [name for name in EDITORS.registered_names() if EDITORS.get(name).needs == "training"]


def make(
    name: str,
    task: Task,
    text: Sequence[str] = (),
    seed: int = 0,
    config: Any = None,
    *,
    modules: Sequence[str] = (),
    layers: str | None = None,
) -> Editor:
    """Return an editor that needs no training, for a model.

    Args:
        name: a name of :data:`remend.registries.EDITORS`.
        task: the model.
        text: passages of ordinary text, for editors that measure the model's activations.
        seed: of every random draw.
        config: the editor's configuration; by default its own default.
        modules: globs of the matrices to edit, for editors that let one choose.
        layers: the blocks to edit.

    Raises:
        ConfigError: there is no such editor, it needs training or a text, or has no use for an option.
        ModelError: there is nothing in the model that it could edit.
    """
    kind = editor_class(name)
    if kind.info.needs == "training":
        raise ConfigError(
            f"{name} is trained before its first edit: remend train … --method {name} --out DIR, then DIR"
        )
    return kind.create(task, config, text=text, seed=seed, modules=modules, layers=layers)


def load_editor(path: str | Path) -> Editor:
    """Return the editor in a folder, of whatever class; ``atlas`` is the one that ships with remend.

    Raises:
        FileError: the folder is missing, damaged, altered, of an unknown version, or of an unknown editor.
    """
    path = editor_folder(path)
    name = read_manifest(path, EDITOR_FORMAT).get("editor")
    if not isinstance(name, str) or name not in EDITORS:
        raise FileError(
            f"{path} holds the editor {name!r}, which is not known here; known: {', '.join(EDITORS.names())}"
        )
    return editor_class(name).load(path)


def load_trained(path: str | Path) -> TrainableEditor:
    """Return the trained editor in a folder.

    Raises:
        FileError: as :func:`load_editor`; or the editor is one that is not trained.
    """
    editor = load_editor(path)
    if not isinstance(editor, TrainableEditor):
        raise FileError(f"{path} holds the editor {editor.info.name!r}, which is not trained; load_editor reads it")
    return editor
