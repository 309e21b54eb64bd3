"""Editors: what turns an edit request into an edit."""

from remend.editors.mend import Mend, MendConfig
from remend.editors.protocol import Editor

__all__ = ["Editor", "Mend", "MendConfig"]
