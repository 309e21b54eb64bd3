"""The studio: a web page on which a wrong answer is put right without writing code."""

from remend.apps.studio.suggestions import Suggested, suggest
from remend.apps.studio.workspace import Made, Session, Workspace

__all__ = ["Made", "Session", "Suggested", "Workspace", "suggest"]
