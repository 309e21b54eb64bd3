"""The kinds of edit that editors make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from remend.edit import Edit
from remend.editors.in_context import FORMAT as CONTEXT
from remend.editors.in_context import ContextEdit
from remend.editors.lookup import FORMAT as CACHE
from remend.editors.lookup import LookupEdit
from remend.serialization import read_format

AnyEdit = Edit | LookupEdit | ContextEdit
"""What an editor makes: a change of weights, a cache of answers, or facts to be told."""


def load_edit(path: str | Path) -> AnyEdit:
    """The edit that a folder holds, of whatever kind.

    Raises:
        FileError: it is missing, damaged, altered, or of a version that this release does not know.
    """
    kinds: dict[str, Callable[[str | Path], AnyEdit]] = {CACHE: LookupEdit.load, CONTEXT: ContextEdit.load}
    return kinds.get(read_format(path), Edit.load)(path)
