"""Findings: statements of the paper, or of this project, that the figures confirm or refute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .results import Results

TOLERANCE = 0.005
"""Differences of means below this count as none."""

Check = Callable[[Results], bool | None]
"""Whether a finding holds; None if a figure that it needs was not measured."""

TestbedCheck = Callable[[Results, str], bool | None]
"""The same for one testbed, which is given by its name."""


@dataclass(frozen=True)
class Finding:
    """A statement about a table.

    Attributes:
        text: the statement.
        holds: whether it holds here; None if that was not measured.
    """

    text: str
    holds: Check


def all_hold(*conditions: bool | float) -> bool | None:
    """Tell whether all conditions hold; None if one is NaN, because it compares what was not measured."""
    return None if any(isinstance(c, float) and math.isnan(c) for c in conditions) else all(conditions)


def any_holds(conditions: Iterable[bool | None]) -> bool | None:
    """Tell whether a condition holds; None if none was measured."""
    measured = [condition for condition in conditions if condition is not None]
    return any(measured) if measured else None


def at_least(value: float, bound: float, tolerance: float = TOLERANCE) -> bool | float:
    """Tell whether ``value`` ≥ ``bound``; NaN if either is NaN."""
    return math.nan if math.isnan(value) or math.isnan(bound) else value >= bound - tolerance


def on(testbed: str, holds: TestbedCheck) -> Check:
    """Return a check that something holds on one testbed."""
    return lambda results: holds(results, testbed)


def in_each(testbeds: tuple[str, ...], holds: TestbedCheck) -> Check:
    """Return a check that something holds in each testbed that was measured, including those that users gave."""

    def check(results: Results) -> bool | None:
        verdicts = [holds(results, testbed) for testbed in (*testbeds, *results.user_testbeds())]
        measured = [verdict for verdict in verdicts if verdict is not None]
        return all(measured) if measured else None

    return check


def success_not_below(
    method: str, others: tuple[str, ...], edits: int = 1, tolerance: float = TOLERANCE
) -> TestbedCheck:
    """Return a check that a method has at least the edit success of others."""
    return lambda results, testbed: all_hold(
        *(
            at_least(results.success(testbed, method, edits), results.success(testbed, other, edits), tolerance)
            for other in others
        )
    )


def dominates(method: str, others: tuple[str, ...]) -> TestbedCheck:
    """Return a check that a method has at least the edit success of others, and localities that are no worse."""

    def check(results: Results, testbed: str) -> bool | None:
        conditions: list[bool | float] = []
        for other in others:
            conditions.append(at_least(results.success(testbed, method), results.success(testbed, other)))
            conditions += [
                at_least(results.locality(testbed, method, kind), results.locality(testbed, other, kind))
                for kind in ("far", "near")
            ]
        return all_hold(*conditions)

    return check


def many_edits_succeed(methods: tuple[str, ...], testbed: str) -> Check:
    """Return a check that one of the methods has success ≥ .95 with drawdown ≤ .01 at 125 edits."""
    return lambda results: any_holds(
        all_hold(
            at_least(results.success(testbed, method, 125), 0.95, 0),
            at_least(0.01, results.drawdown(testbed, method, 125), 0),
        )
        for method in methods
    )
