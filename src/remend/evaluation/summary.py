"""``Summary``: a mean with its 95 % confidence interval, as all reports have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from remend.errors import NonFiniteError

BOOTSTRAP_RESAMPLES = 1_000


@dataclass(frozen=True)
class Summary:
    """A mean with its 95 % bootstrap confidence interval."""

    mean: float
    ci95: tuple[float, float]
    n: int

    @property
    def has_interval(self) -> bool:
        """Whether the interval tells anything: that of one value is this value."""
        return self.n > 1 or self.ci95[0] < self.ci95[1]

    @staticmethod
    def of(values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None) -> Summary:
        """Summarize one value for each edit or text (percentile bootstrap over them, seeded).

        Args:
            values: the values.
            seed: of the draws.
            weights: of each value in the mean, such as the number of choices that it is a share of; by default equal.

        Raises:
            NonFiniteError: a value is NaN or infinite; it is never dropped.
        """
        array = np.asarray(values, dtype=np.float64)
        if array.size == 0 or not np.isfinite(array).all():
            raise NonFiniteError(
                f"{int((~np.isfinite(array)).sum())} of the {array.size} values to average are not finite"
            )
        # A few lines of numpy rather than scipy.stats.bootstrap: the package does not depend on scipy, and other draws
        # would move the intervals of existing reports.
        draws = np.random.default_rng(seed).integers(0, array.size, (BOOTSTRAP_RESAMPLES, array.size))
        if weights is None:
            mean, means = array.mean(), array[draws].mean(1)
        else:
            weight = np.asarray(weights, dtype=np.float64)
            mean = (array * weight).sum() / weight.sum()
            means = (array * weight)[draws].sum(1) / weight[draws].sum(1)
        low, high = np.quantile(means, (0.025, 0.975))
        return Summary(float(mean), (float(low), float(high)), int(array.size))
