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
    """Return the number of a label that is given by its name, in any case if only one is so named, or by its number.

    Raises:
        RequestError: there is no such label, or several that differ in case.
    """
    if target in labels:
        return labels.index(target)
    alike = [number for number, label in enumerate(labels) if label.casefold() == target.casefold()]
    if len(alike) > 1:
        raise RequestError(
            f"the model has several labels {target!r} that differ in case, {[labels[number] for number in alike]}: "
            "give one as it is written"
        )
    if alike:
        return alike[0]
    if target.isascii() and target.isdecimal() and int(target) < len(labels):
        return int(target)
    raise RequestError(
        f"the model has no label {target!r}; {nearest(target, labels)} (a number from 0 to {len(labels) - 1} "
        "will do too)"
    )
