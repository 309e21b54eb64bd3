"""Editors: what turns an edit request into an edit."""

from remend.editors.config import MendConfig
from remend.editors.mend import Mend
from remend.editors.protocol import Editor

__all__ = ["Editor", "Mend", "MendConfig"]
