"""Text that came from a file, a model or a person, made safe to print."""

from __future__ import annotations

import unicodedata

from rich.markup import escape

from remend.visible_text import mark_invisible


def plain(value: object) -> str:
    """``value`` as text that a terminal shows as it is: no markup, and no control characters that could steer it.

    Characters that are invisible or reorder others are shown by their numbers.
    """
    text = " ".join(str(value).splitlines()).replace("\t", " ")
    return escape(mark_invisible("".join(c for c in text if unicodedata.category(c) != "Cc")))
