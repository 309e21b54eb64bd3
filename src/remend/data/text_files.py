"""Read plain text files as passages, on which activations and perplexity are measured."""

from __future__ import annotations

import re
from pathlib import Path

from remend.errors import RequestError

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def read_text(path: str | Path) -> list[str]:
    """Return the passages of a plain text file, which are separated by blank lines.

    Raises:
        RequestError: there is no such file, it is no UTF-8 text, or it holds no words.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # its name may hold a null character
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        named = repr(str(path)) if "\0" in str(path) else path
        raise RequestError(f"{named} cannot be read as plain UTF-8 text ({reason}): name a text file") from None
    passages = [passage for passage in _BLANK_LINE.split(text) if passage.strip()]
    if not passages:
        raise RequestError(f"{path} holds no text: name a file of ordinary text")
    return passages
