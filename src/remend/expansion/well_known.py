"""Well-known subjects of several kinds, about which a general language model knows something."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
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


def names_asked(question: str | None) -> list[str]:
    """Return the names of the kinds that a common question is asked of; all names where none is known."""
    kinds = [kind for kind, questions in asked_of().items() if question in questions]
    return [name for kind, names in well_known().items() if not kinds or kind in kinds for name in names]
