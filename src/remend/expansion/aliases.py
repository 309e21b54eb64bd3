"""Other names of a subject, by rules of how names are written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_DASHES = re.compile(r"[‐‑‒–—]")
_INITIAL = re.compile(r"[A-Z]\.?")
_LEGAL_FORM = re.compile(
    r",?\s+(?:Inc|Incorporated|Corp|Corporation|Ltd|Limited|LLC|PLC|plc|GmbH|AG|S\.?A|Co|Company)\.?$"
)
_ARTICLE = re.compile(r"^the\s+", re.IGNORECASE)


def aliases(name: str) -> list[str]:
    """Return other ways to write a name, each by one rule and by all of them together, without the name itself.

    Letters without their marks, plain dashes, no initials between first and last name, no legal form of a company, and
    no article before it. What is left has at least two letters.
    """
    found = {rule(name) for rule in _RULES}
    together = name
    for rule in _RULES:
        together = rule(together)
    return sorted(alias for alias in {*found, together} - {name} if sum(map(str.isalpha, alias)) > 1)


def _without_marks(name: str) -> str:
    """Return a name in plain letters, as a keyboard without marks writes it."""
    parts = unicodedata.normalize("NFD", name)
    return unicodedata.normalize("NFC", "".join(c for c in parts if not unicodedata.combining(c)))


def _without_initials(name: str) -> str:
    """Return a name without single letters between its first and last word."""
    words = name.split()
    if len(words) < 3 or _INITIAL.fullmatch(words[0]):
        return name
    return " ".join([words[0], *(word for word in words[1:-1] if not _INITIAL.fullmatch(word)), words[-1]])


def _with_plain_dashes(name: str) -> str:
    return _DASHES.sub("-", name)


def _without_legal_form(name: str) -> str:
    return _LEGAL_FORM.sub("", name)


def _without_article(name: str) -> str:
    return _ARTICLE.sub("", name)


_RULES = (_without_marks, _with_plain_dashes, _without_initials, _without_legal_form, _without_article)


def with_alias(text: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield a text with each alias in place of a name that it holds, and the alias."""
    for alias in aliases(name):
        changed = re.sub(re.escape(name), lambda _, alias=alias: alias, text, flags=re.IGNORECASE)  # type: ignore[misc]
        if changed != text:
            yield changed, alias
