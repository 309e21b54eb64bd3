"""Well-known subjects of several kinds, about which a general language model knows something."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any


@cache
def _content() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("well_known.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


@cache
def well_known() -> dict[str, tuple[str, ...]]:
    """Return the names of each kind."""
    return {kind: tuple(names) for kind, names in _content()["names"].items()}


@cache
def asked_of() -> dict[str, frozenset[str]]:
    """Return the common questions that are asked of each kind."""
    return {kind: frozenset(questions) for kind, questions in _content()["asked_of"].items()}


KINDS: Mapping[str, str] = MappingProxyType(
    {"city": "city", "country": "country", "person": "person", "company": "organization", "book": "work"}
)
"""The kinds of :mod:`remend.expansion.kinds`, as they are called here."""


def names_asked(question: str | None, kind: str | None = None) -> list[str]:
    """Return the names of the kinds that a common question is asked of; where none is known, all names of a kind.

    Args:
        question: the question; None where it is not known.
        kind: of what kind the subject is (:func:`remend.expansion.kinds.kind_of`); None where that is not known.
    """
    kinds = [each for each, questions in asked_of().items() if question in questions]
    if not kinds and kind is not None and kind in KINDS:
        kinds = [KINDS[kind]]
    return [name for each, names in well_known().items() if not kinds or each in kinds for name in names]


def suits(question: str, kind: str | None) -> bool:
    """Tell whether a common question may be asked of a name of a kind: it is, or of no kind it is known."""
    listed = [each for each, questions in asked_of().items() if question in questions]
    return not listed or kind is None or kind not in KINDS or KINDS[kind] in listed
