"""The numbers of each method: means over the seeds with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student_t

from .cell_definitions import Cell
from .methods import METHODS
from .result_folder import ResultFolder


def t_quantile(degrees_of_freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t distribution."""
    # Three digits, as printed tables of the quantiles have: the committed intervals were computed with those.
    return round(float(student_t.ppf(0.975, degrees_of_freedom)), 3)


@dataclass(frozen=True)
class Figure:
    """A metric over the seeds.

    Attributes:
        mean: the mean of the seeds' means.
        half_width: half the width of the 95 % interval (Student's t); None with one seed.
    """

    mean: float
    half_width: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Figure:
        """Compute the figure from the seeds' means."""
        count = len(values)
        half_width = None
        if count > 1:
            half_width = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
        return Figure(statistics.fmean(values), half_width)

    def text(self) -> str:
        """Return the figure as tables show it."""
        return f"{self.mean:.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")


class Results:
    """The figures in a folder, by testbed, method and number of edits."""

    def __init__(self, folder: ResultFolder) -> None:
        self.folder = folder
        self.testbeds = folder.testbeds

    def user_testbeds(self) -> list[str]:
        """Return the names of the testbeds that users gave."""
        return [name for name, testbed in self.testbeds.items() if testbed.folder is not None]

    def get(self, testbed: str, method: str, metric: str, edits: int = 1) -> Figure | None:
        """Return a metric of one method; None if nothing was measured or a seed failed.

        With a failed seed left out, the mean of the others would be too good.
        """
        results = self._of_seeds(testbed, method, edits)
        if any("failed" in result for result in results):
            return None
        values = [result["figures"][metric]["mean"] for result in results if metric in result["figures"]]
        return Figure.of(values) if values else None

    def failures(self, testbed: str, method: str, edits: int = 1) -> dict[str, str]:
        """Return why there is no figure of a method: the error of each failed cell, by the cell's id."""
        results = self._of_seeds(testbed, method, edits)
        return {result["cell"]: result["failed"] for result in results if "failed" in result}

    def _of_seeds(self, testbed: str, method: str, edits: int) -> list[dict[str, Any]]:
        cells = [Cell(testbed, method, edits, seed) for seed in range(self.folder.scale.seeds)]
        return [result for cell in cells if (result := self.folder.read(cell)) is not None]

    def perplexity(self, testbed: str) -> float | None:
        """Return the unedited model's perplexity on the text, if it was measured."""
        results = [self.folder.read(Cell(testbed, name, 1, 0)) for name in METHODS]
        return next(
            (result["perplexity"] for result in results if result is not None and result.get("perplexity")), None
        )

    def success(self, testbed: str, method: str, edits: int = 1) -> float:
        """Return the mean of the testbed's metric of edit success; NaN if it was not measured."""
        if testbed not in self.testbeds:
            return math.nan
        return _mean(self.get(testbed, method, self.testbeds[testbed].success, edits))

    def drawdown(self, testbed: str, method: str, edits: int = 1) -> float:
        """Return the mean drawdown of accuracy or perplexity, whichever the testbed has; NaN if it was not measured."""
        if testbed not in self.testbeds:
            return math.nan
        return _mean(self.get(testbed, method, self.testbeds[testbed].drawdown, edits))

    def locality(self, testbed: str, method: str, kind: str) -> float:
        """Return the mean locality, ``far`` or ``near``; NaN if it was not measured."""
        return _mean(self.get(testbed, method, f"locality_{kind}"))


def _mean(figure: Figure | None) -> float:
    return math.nan if figure is None else figure.mean
