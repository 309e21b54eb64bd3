"""Editors: what turns an edit request into an edit."""

from remend.editors.edit_types import AnyEdit, load_edit
from remend.editors.info import EditorInfo
from remend.editors.mend.config import MendConfig
from remend.editors.mend.editor import Mend
from remend.editors.protocol import Editor
from remend.editors.registry import EDITORS, TRAINED, UNTRAINED, Trainable, load_editor, load_trained, make

__all__ = [
    "EDITORS",
    "TRAINED",
    "UNTRAINED",
    "AnyEdit",
    "Editor",
    "EditorInfo",
    "Mend",
    "MendConfig",
    "Trainable",
    "load_edit",
    "load_editor",
    "load_trained",
    "make",
]
