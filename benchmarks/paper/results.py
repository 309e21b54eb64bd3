"""What was measured of each method, over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cells import METHODS, Cell
from .workshop import Workshop

STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Two-sided 95 % quantiles of Student's t for 1, 2, … 30 degrees of freedom, one fewer than seeds."""


def student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t."""
    # Beyond the table, the first terms of the expansion about the normal's quantile: right to three digits.
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.960 + 2.372 / freedom + 2.822 / freedom**2


@dataclass(frozen=True)
class Figure:
    """A metric over the seeds.

    Attributes:
        mean: of the seeds' means.
        half: half the width of the 95 % interval (Student's t); None of one seed.
    """

    mean: float
    half: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Figure:
        """The figure of some seeds' means."""
        count = len(values)
        half = None
        if count > 1:
            half = student(count - 1) * statistics.stdev(values) / math.sqrt(count)
        return Figure(statistics.fmean(values), half)

    def text(self) -> str:
        """As tables show it."""
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


class Results:
    """Figures by world, method and number of edits."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    def given(self) -> list[str]:
        """The worlds that are not built in."""
        return [name for name, world in self.workshop.worlds.items() if world.folder is not None]

    def get(self, world: str, method: str, metric: str, edits: int = 1) -> Figure | None:
        """A metric of one method; None where nothing was measured, or a seed failed: the others' mean would flatter."""
        kept = self._kept(world, method, edits)
        if any("failed" in own for own in kept):
            return None
        values = [own["figures"][metric]["mean"] for own in kept if metric in own["figures"]]
        return Figure.of(values) if values else None

    def failures(self, world: str, method: str, edits: int = 1) -> dict[str, str]:
        """Why there is no figure of a method: what went wrong, by the name of the cell."""
        return {own["cell"]: own["failed"] for own in self._kept(world, method, edits) if "failed" in own}

    def _kept(self, world: str, method: str, edits: int) -> list[dict[str, Any]]:
        """What is there of each seed."""
        cells = [Cell(world, method, edits, seed) for seed in range(self.workshop.scale.seeds)]
        return [found for cell in cells if (found := self.workshop.found(cell)) is not None]

    def perplexity(self, world: str) -> float | None:
        """What perplexity other text has without an edit, where that was measured."""
        cells = [self.workshop.found(Cell(world, name, 1, 0)) for name in METHODS]
        return next((own["perplexity"] for own in cells if own is not None and own.get("perplexity")), None)

    def success(self, world: str, method: str, edits: int = 1) -> float:
        """Mean edit success, as the world counts it; NaN where nothing was measured."""
        if world not in self.workshop.worlds:
            return math.nan
        return self._mean(self.get(world, method, self.workshop.worlds[world].success, edits))

    def drawdown(self, world: str, method: str, edits: int = 1) -> float:
        """Mean drawdown, of accuracy or perplexity as the world has it; NaN where nothing was measured."""
        if world not in self.workshop.worlds:
            return math.nan
        return self._mean(self.get(world, method, self.workshop.worlds[world].drawdown, edits))

    def locality(self, world: str, method: str, kind: str) -> float:
        """Mean locality, ``far`` or ``near``; NaN where nothing was measured."""
        return self._mean(self.get(world, method, f"locality_{kind}"))

    @staticmethod
    def _mean(figure: Figure | None) -> float:
        return math.nan if figure is None else figure.mean
