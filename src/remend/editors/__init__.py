"""Editors: what turns an edit request into an edit."""

from remend.editors.config import MendConfig
from remend.editors.mend import Mend
from remend.editors.protocol import Editor, Traits
from remend.editors.registry import EDITORS, TRAINED, Trainable, load_trained

__all__ = ["EDITORS", "TRAINED", "Editor", "Mend", "MendConfig", "Trainable", "Traits", "load_trained"]
