"""Two or more reports side by side: the same edits, by different editors or of different models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remend.errors import ConfigError
from remend.evaluation.reports.report import Case, Report, Summary, metrics_of

MODES = ("generated", "teacher_forced", "contains", "token_f1", "token_accuracy", "value")


@dataclass(frozen=True)
class Difference:
    """How one metric of another report differs from the first one's.

    Attributes:
        metric, mode: what is compared.
        first, other: the means over the edits that both have.
        difference: other − first with its 95 % interval, from a bootstrap over pairs: what is hard for both cancels.
    """

    metric: str
    mode: str
    first: float
    other: float
    difference: Summary

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.difference.ci95[0] <= 0 <= self.difference.ci95[1]


def compare(
    first: Report, other: Report, names: tuple[str, str] = ("the first report", "the other")
) -> list[Difference]:
    """Every metric and mode that both reports have, over the edits that both have: of each report's last run.

    Args:
        first: what is compared with.
        other: what is compared.
        names: what messages call them.

    Raises:
        ConfigError: they share no edit, so there is nothing to compare.
    """
    pairs = list(_paired(first.cases, other.cases))
    if not pairs:
        raise ConfigError(
            f"{names[0]} and {names[1]} share no edit (by id, prompt and target): evaluate both on the same requests, "
            "with the same --limit and --seed"
        )
    found = []
    shared = metrics_of([one for one, _ in pairs])
    for metric, modes in shared.items():
        for mode in modes:
            values = [
                (one.values[metric][mode], two.values[metric][mode])
                for one, two in pairs
                if mode in one.values.get(metric, {}) and mode in two.values.get(metric, {})
            ]
            if values:
                ours, theirs = (sum(own) / len(own) for own in zip(*values, strict=True))
                difference = Summary.of([theirs_ - ours_ for ours_, theirs_ in values])
                found.append(Difference(metric, mode, ours, theirs, difference))
    return found


def _paired(first: Sequence[Case], other: Sequence[Case]) -> list[tuple[Case, Case]]:
    by_name = {(case.id, case.prompt, case.target): case for case in other}
    return [(case, by_name[key]) for case in first if (key := (case.id, case.prompt, case.target)) in by_name]
