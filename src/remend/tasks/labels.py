"""Labels of classifiers: their names, and the number that a target means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remend.errors import RequestError, nearest


def label_names(config: Any) -> tuple[str, ...]:
    """Return the labels' names of a transformers configuration, by number."""
    names = getattr(config, "id2label", None) or {}
    return tuple(str(names[number]) for number in sorted(names))


def label_number(target: str, labels: Sequence[str]) -> int:
    """Return the number of a label that is given by its name, in any case, or by its number.

    Raises:
        RequestError: there is no such label.
    """
    names = [label.casefold() for label in labels]
    if target.casefold() in names:
        return names.index(target.casefold())
    if target.isdecimal() and int(target) < len(names):
        return int(target)
    raise RequestError(
        f"the model has no label {target!r}; {nearest(target, labels)} (a number from 0 to {len(names) - 1} "
        "will do too)"
    )
