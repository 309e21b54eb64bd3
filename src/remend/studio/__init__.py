"""The studio: a web page on which a wrong answer is put right without writing code."""

from remend.studio.desk import Desk, Made, Session
from remend.studio.suggestions import Suggested, suggest

__all__ = ["Desk", "Made", "Session", "Suggested", "suggest"]
