"""Plain text as passages."""

from __future__ import annotations

import re
from pathlib import Path

from remend.errors import RequestError

_BLANK = re.compile(r"\n[^\S\n]*\n")


def read_text(path: str | Path) -> list[str]:
    """The passages of a plain text file, which blank lines separate.

    Raises:
        RequestError: there is no such file, it is no UTF-8 text, or it holds no words.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as plain UTF-8 text ({_why(error)}): name a text file") from None
    passages = [passage for passage in _BLANK.split(text) if passage.strip()]
    if not passages:
        raise RequestError(f"{path} holds no text: name a file with ordinary text, as long as you have it")
    return passages


def _why(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
