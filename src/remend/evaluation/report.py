"""The evaluation report: means over edits with confidence intervals, cost and environment, as one JSON object."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import remend
from remend.errors import NonFiniteError
from remend.storage import write_json

SCHEMA = "remend.report/1"
MODES = ("teacher_forced", "generated")
RESAMPLES = 1_000
METRICS = (
    "reliability",
    "generality",
    "generality_unseen",
    "edit_success",
    "locality_far",
    "locality_near",
    "accuracy_drawdown",
    "portability",
)
"""In the order in which they are reported."""


@dataclass(frozen=True)
class Summary:
    """A mean over edits with its 95 % bootstrap confidence interval."""

    mean: float
    ci95: tuple[float, float]
    n: int

    @staticmethod
    def of(values: Sequence[float], seed: int = 0) -> Summary:
        """Summarise one value an edit (percentile bootstrap over edits, seeded).

        Raises:
            NonFiniteError: a value is NaN or infinite; it is never dropped.
        """
        array = np.asarray(values, dtype=np.float64)
        if array.size == 0 or not np.isfinite(array).all():
            raise NonFiniteError(f"{int((~np.isfinite(array)).sum())} of {array.size} values to average are not finite")
        draws = np.random.default_rng(seed).integers(0, array.size, (RESAMPLES, array.size))
        low, high = np.quantile(array[draws].mean(1), (0.025, 0.975))
        return Summary(float(array.mean()), (float(low), float(high)), int(array.size))


@dataclass(frozen=True)
class Case:
    """What one edit did: the value of each metric that its request has data for, by mode.

    Attributes:
        id: the request's, or its number in the file.
        prompt: the edited prompt, a conversation as people read it.
        target: what it should answer.
        before: the unedited model's own answer.
        values: metric → mode → value between 0 and 1 (a drawdown may be negative).
    """

    id: str | int
    prompt: str
    target: str
    before: str
    values: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Report:
    """What :func:`remend.evaluate` found.

    Attributes:
        model: what was edited.
        data: where the requests are from.
        cases: one entry an edit.
        seconds_per_edit: wall time of making an edit, evaluation not included.
        environment: versions, device and threads.
        editor: the name of what made the edits, if it was told.
        frontier: the same cases with the edits multiplied by each of some scales, if that was asked for.
    """

    model: str
    data: str
    cases: Sequence[Case]
    seconds_per_edit: float
    environment: Mapping[str, Any] = field(default_factory=dict)
    frontier: Mapping[float, Sequence[Case]] = field(default_factory=dict)
    editor: str = ""

    def metrics(self) -> dict[str, dict[str, Summary]]:
        """Each metric that has data, by mode. One without data is absent, never 0."""
        return _metrics(self.cases)

    def frontier_metrics(self) -> dict[float, dict[str, dict[str, Summary]]]:
        """The same at each scale of the frontier."""
        return {scale: _metrics(cases) for scale, cases in self.frontier.items()}

    def to_json(self) -> dict[str, Any]:
        """The report as schema ``remend.report/1``."""
        at_scales = {scale: _as_json(metrics) for scale, metrics in self.frontier_metrics().items()}
        frontier = [{"scale": scale, "metrics": metrics} for scale, metrics in at_scales.items()]
        return {
            "schema": SCHEMA,
            "model": self.model,
            "data": self.data,
            **({"editor": self.editor} if self.editor else {}),
            "edits": len(self.cases),
            "metrics": _as_json(self.metrics()),
            **({"frontier": frontier} if frontier else {}),
            "cost": {"seconds_per_edit": self.seconds_per_edit, "peak_memory_bytes": peak_memory()},
            "environment": dict(self.environment),
            "cases": [
                {"id": c.id, "prompt": c.prompt, "target": c.target, "before": c.before, "values": dict(c.values)}
                for c in self.cases
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_json(path, self.to_json())


def _metrics(cases: Sequence[Case]) -> dict[str, dict[str, Summary]]:
    found: dict[str, dict[str, Summary]] = {}
    names = dict.fromkeys(name for case in cases for name in case.values)
    for name in sorted(names, key=_order):
        having = [case.values[name] for case in cases if name in case.values]
        found[name] = {mode: Summary.of([values[mode] for values in having]) for mode in MODES}
    return found


def _order(metric: str) -> tuple[int, str]:
    """Where a metric stands in a report; kinds of near prompts after all near prompts."""
    return max(place for place, known in enumerate(("", *METRICS)) if metric.startswith(known)), metric


def _as_json(metrics: Mapping[str, Mapping[str, Summary]]) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        name: {mode: {"mean": s.mean, "ci95": list(s.ci95), "n": s.n} for mode, s in modes.items()}
        for name, modes in metrics.items()
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code: versions, processor or GPU, threads."""
    return {
        "remend": remend.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def peak_memory() -> int | None:
    """The most memory this process has held so far, in bytes: the GPU's where one is used, else resident memory.

    None where the system does not tell (Windows).
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
