"""Editors: what turns an edit request into an edit."""

from remend.editors.base import Editor, EditorLike, WeightEditor
from remend.editors.default_editor import DefaultEditor, default_editor
from remend.editors.edit_types import AnyEdit, load_edit
from remend.editors.info import EditorInfo
from remend.editors.kept_statistics import make_or_load
from remend.editors.loading import (
    editor_class,
    load_editor,
    load_trained,
    make,
    trainable_class,
    trained_names,
)
from remend.editors.mend.config import MendConfig
from remend.editors.mend.editor import Mend
from remend.editors.trainable import TrainableEditor
from remend.registries import EDITORS

__all__ = [
    "EDITORS",
    "AnyEdit",
    "DefaultEditor",
    "Editor",
    "EditorInfo",
    "EditorLike",
    "Mend",
    "MendConfig",
    "TrainableEditor",
    "WeightEditor",
    "default_editor",
    "editor_class",
    "load_edit",
    "load_editor",
    "load_trained",
    "make",
    "make_or_load",
    "trainable_class",
    "trained_names",
]
