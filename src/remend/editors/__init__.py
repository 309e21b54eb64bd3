"""Editors: what turns an edit request into an edit."""

from remend.editors.config import MendConfig
from remend.editors.edits import AnyEdit, load_edit
from remend.editors.mend import Mend
from remend.editors.protocol import Editor
from remend.editors.registry import EDITORS, TRAINED, UNTRAINED, Trainable, load_editor, load_trained, make
from remend.editors.traits import Traits

__all__ = [
    "EDITORS",
    "TRAINED",
    "UNTRAINED",
    "AnyEdit",
    "Editor",
    "Mend",
    "MendConfig",
    "Trainable",
    "Traits",
    "load_edit",
    "load_editor",
    "load_trained",
    "make",
]
