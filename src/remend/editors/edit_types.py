"""``AnyEdit``: whatever an editor makes, and how it is read from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from remend.edit import Edit
from remend.editors.context_edit import CONTEXT_EDIT_FORMAT, ContextEdit
from remend.editors.lookup_edit import LOOKUP_EDIT_FORMAT, LookupEdit
from remend.saved_folders import read_format

AnyEdit = Edit | LookupEdit | ContextEdit
"""What an editor makes: a change of weights, a table of answers, or facts to put before prompts."""


def load_edit(path: str | Path) -> AnyEdit:
    """Return the edit in a folder, of whatever class.

    Raises:
        FileError: it is missing, damaged, altered, or of a version that this release does not know.
    """
    loaders: dict[str, Callable[[str | Path], AnyEdit]] = {
        LOOKUP_EDIT_FORMAT: LookupEdit.load,
        CONTEXT_EDIT_FORMAT: ContextEdit.load,
    }
    return loaders.get(read_format(path), Edit.load)(path)
