"""How reports show a metric: its title, its help, its place in the order and which way is better, from the registry.

A metric that is measured for several kinds of prompts has the kind at the end of its name in reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

from remend.registries import METRICS, Metric

T = TypeVar("T")

MAIN_MODES = ("generated", "value")
"""The modes that tables show first."""


def find_metric(name: str) -> tuple[Metric | None, str]:
    """Return the metric and the kind of a name in a report, such as ``locality_near_same_object``.

    The metric is None if it is not registered, as in a report that was made where another package is installed.
    """
    matches = [metric for metric in METRICS.names() if name == metric or name.startswith(f"{metric}_")]
    if not matches:
        return None, ""
    longest = max(matches, key=len)  # generality_unseen is a metric, not a kind of generality
    return METRICS.get(longest), name[len(longest) + 1 :]


def title_of(name: str) -> str:
    """Return the title of a metric, with the kind after it."""
    metric, kind = find_metric(name)
    title = metric.title if metric is not None else ""
    return f"{title} {_with_spaces(kind)}".strip() if title else _with_spaces(name)


def help_of(name: str) -> str:
    """Return the sentence that explains a metric; nothing for the kinds of a metric, which stand below it."""
    metric, kind = find_metric(name)
    return "" if metric is None or kind else metric.help


def higher_is_better(name: str) -> bool | None:
    """Tell in which direction a metric is better; None if it is not registered."""
    metric, _ = find_metric(name)
    return None if metric is None else metric.higher_is_better


def in_order(names: list[str]) -> list[str]:
    """Sort names of metrics as the registry lists them, each followed by its kinds; others come last."""
    return sorted(names, key=partial(_sort_key, {metric: index for index, metric in enumerate(METRICS.names())}))


def all_modes() -> list[str]:
    """List the modes of all metrics."""
    return list(dict.fromkeys(mode for metric in METRICS for mode in metric.modes))


def main_value(modes: Mapping[str, T]) -> T:
    """Return the value of the mode that tables show first: ``generated``, ``value``, or the first one there is."""
    return next(modes[mode] for mode in (*MAIN_MODES, *modes) if mode in modes)


def _sort_key(positions: Mapping[str, int], name: str) -> tuple[int, str]:
    metric, _ = find_metric(name)
    return (len(positions) if metric is None else positions[metric.name], name)


def _with_spaces(name: str) -> str:
    return name.replace("_", " ")
