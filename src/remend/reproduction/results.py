"""What was measured of each method, over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remend.reproduction.cells import Cell
from remend.reproduction.workshop import Workshop

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Two-sided 95 % quantiles of Student's t for so many seeds."""


@dataclass(frozen=True)
class Figure:
    """A metric over the seeds.

    Attributes:
        mean: of the seeds' means.
        half: half the width of the 95 % interval (Student's t); None of one seed.
        seeds: how many there are.
    """

    mean: float
    half: float | None
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> Figure:
        """The figure of some seeds' means."""
        count = len(values)
        half = None
        if count > 1:
            half = STUDENT.get(count, 1.96) * statistics.stdev(values) / math.sqrt(count)
        return Figure(statistics.fmean(values), half, count)

    def text(self, sign: bool = False) -> str:
        """As tables show it."""
        own = f"{self.mean:+.3f}" if sign else f"{self.mean:.3f}"
        return own if self.half is None else f"{own} ± {self.half:.3f}"


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

    def success(self, world: str, method: str, edits: int = 1) -> float:
        """Mean edit success (Eq. 1); NaN where nothing was measured."""
        return self._mean(self.get(world, method, "edit_success", edits))

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
