"""Text that came from a file, a model or a person, made safe to print."""

from __future__ import annotations

import unicodedata

from rich.markup import escape


def plain(value: object) -> str:
    """``value`` as text that a terminal shows as it is: no markup, and no control characters that could steer it."""
    text = " ".join(str(value).splitlines()).replace("\t", " ")
    return escape("".join(c for c in text if unicodedata.category(c) != "Cc"))
