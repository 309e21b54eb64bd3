"""``compare``: the differences between two reports of the same requests, by other editors or of other models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remend.errors import ConfigError
from remend.evaluation.reports.metric_titles import higher_is_better
from remend.evaluation.reports.report import Case, Report, metrics_of
from remend.evaluation.summary import Summary


@dataclass(frozen=True)
class MetricDifference:
    """How one metric of another report differs from the first report's.

    Attributes:
        metric, mode: the name and the mode of the metric.
        first, other: the means over the edits that both have.
        difference: other − first with its 95 % interval, from a bootstrap over pairs, so that what is hard for both
            cancels.
    """

    metric: str
    mode: str
    first: float
    other: float
    difference: Summary

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.difference.ci95[0] <= 0 <= self.difference.ci95[1]

    @property
    def better(self) -> bool | None:
        """Whether the other report is better; None if the metric is not registered: its direction is unknown."""
        direction = higher_is_better(self.metric)
        return None if direction is None else (self.difference.mean > 0) == direction


def compare(
    first: Report, other: Report, names: tuple[str, str] = ("the first report", "the other")
) -> list[MetricDifference]:
    """Return the difference of each metric and mode over the edits that the last runs of both reports have.

    Args:
        first: the report that the other is compared with.
        other: the report that is compared.
        names: their names in messages.

    Raises:
        ConfigError: they share no edit, so there is nothing to compare.
    """
    pairs = _pair_cases(first.cases, other.cases)
    if not pairs:
        raise ConfigError(
            f"{names[0]} and {names[1]} share no edit (with the same id, prompt and target): evaluate both on the same "
            "requests, with the same --limit and --seed"
        )
    differences = []
    for metric, modes in metrics_of([case for case, _ in pairs]).items():
        for mode in modes:
            values = [
                (case.values[metric][mode], other_case.values[metric][mode])
                for case, other_case in pairs
                if mode in case.values.get(metric, {}) and mode in other_case.values.get(metric, {})
            ]
            if values:
                mean, other_mean = (sum(column) / len(column) for column in zip(*values, strict=True))
                difference = Summary.of([other_value - value for value, other_value in values])
                differences.append(MetricDifference(metric, mode, mean, other_mean, difference))
    return differences


def _pair_cases(first: Sequence[Case], other: Sequence[Case]) -> list[tuple[Case, Case]]:
    """Return the cases that both have, with the same id, prompt and target."""
    by_key = {(case.id, case.prompt, case.target): case for case in other}
    return [(case, by_key[key]) for case in first if (key := (case.id, case.prompt, case.target)) in by_key]
