"""A hook of mkdocs: puts a table of a registry where a page has ``<!-- registry: NAME -->``, such as ``METRICS``."""

from __future__ import annotations

import re
from typing import Any

from remend import registries

MARKER = re.compile(r"<!-- registry: (\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page."""
    return MARKER.sub(lambda match: registry_table(match[1]), markdown)


def registry_table(name: str) -> str:
    """Return what a registry holds as a Markdown table, one row for each entry."""
    registry = getattr(registries, name)
    rows = [f"| `{key}` | {registry.get(key).help} |" for key in registry.registered_names()]
    return "\n".join(["| name | what it is |", "|---|---|", *rows])
