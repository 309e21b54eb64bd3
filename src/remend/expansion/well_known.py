"""Well-known subjects of several kinds, about which a general language model knows something."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources


@cache
def well_known() -> dict[str, tuple[str, ...]]:
    """Return the names of each kind."""
    text = resources.files(__package__).joinpath("well_known.json").read_text(encoding="utf-8")
    return {kind: tuple(names) for kind, names in json.loads(text).items()}


def well_known_names() -> list[str]:
    """Return all names."""
    return [name for names in well_known().values() for name in names]
