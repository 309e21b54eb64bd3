"""The evaluation report: means over edits with confidence intervals, cost and environment, as one JSON object."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import remend
from remend.errors import NonFiniteError
from remend.evaluation.before_after import Answer
from remend.serialization import write_json

SCHEMA = "remend.report/2"
RESAMPLES = 1_000
METRICS = (
    "reliability",
    "generality",
    "generality_unseen",
    "edit_success",
    "format_shift",
    "portability",
    "locality_far",
    "locality_near",
    "locality_adversarial",
    "accuracy_drawdown",
    "perplexity_drawdown",
    "kl_far",
    "kl_near",
    "kl_adversarial",
    "target_probability",
    "target_rank",
    "fluency",
    "repetition",
)
"""In the order in which they are reported; what begins with a name stands after it."""


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
    """What was found for one edit: the value of each metric that its request has data for, by mode.

    Attributes:
        id: the request's, or its number in the file.
        prompt: the edited prompt, a conversation as people read it.
        target: what it should answer.
        before: the unedited model's own answer.
        values: metric → mode → value. Modes are ``teacher_forced``, ``token_accuracy``, ``generated``, ``contains`` and
            ``token_f1``, or ``value`` where there is one only.
        about: what results are broken down by: ``relation``, ``target_tokens``, and ``confidence``, the probability of
            the unedited model's own answer.
        answers: every prompt's answer before and after.
    """

    id: str | int
    prompt: str
    target: str
    before: str
    values: Mapping[str, Mapping[str, float]]
    about: Mapping[str, str | float] = field(default_factory=dict)
    answers: Sequence[Answer] = ()

    def to_json(self) -> dict[str, Any]:
        """As an object of the report."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "target": self.target,
            "before": self.before,
            "about": dict(self.about),
            "values": {name: dict(modes) for name, modes in self.values.items()},
            "answers": [asdict(answer) for answer in self.answers],
        }

    @staticmethod
    def of(found: Mapping[str, Any]) -> Case:
        """The case of such an object, which was checked already."""
        return Case(**{**found, "answers": tuple(Answer(**answer) for answer in found["answers"])})


@dataclass(frozen=True)
class Run:
    """One number of edits at work in the model at once, and what was found then.

    Attributes:
        edits: how many.
        cases: of all edits, each judged while so many are at work.
        seconds_per_edit: wall time of making an edit, evaluation not included.
    """

    edits: int
    cases: Sequence[Case]
    seconds_per_edit: float

    def metrics(self) -> dict[str, dict[str, Summary]]:
        """Each metric that has data, by mode. One without data is absent, never 0."""
        return metrics_of(self.cases)


@dataclass(frozen=True)
class Report:
    """What :func:`remend.evaluate` found.

    Attributes:
        model: what was edited.
        data: where the requests are from.
        editor: the name of what made the edits.
        protocol: ``single``, ``batched``, ``sequential``, or ``checkpoints`` where two models were given.
        runs: by how many edits were at work; of single edits there is one.
        baselines: what was found without any edit (``unedited``), and with the fact in the prompt (``in_context``).
        frontier: single edits multiplied by each of some scales, if that was asked for.
        text: of the text that perplexity was measured on, its ``tokens`` and ``perplexity`` before any edit.
        settings: what else was asked for, such as ``seed`` and ``limit`` of the command line.
        left_out: how many requests or prompts were not judged, by reason.
        environment: versions, device and threads.
        general: of lm-eval's tasks, if that was asked for: task → metric → ``before`` and ``after``.
    """

    model: str
    data: str
    runs: Sequence[Run]
    environment: Mapping[str, Any] = field(default_factory=dict)
    editor: str = ""
    protocol: str = "single"
    baselines: Mapping[str, Sequence[Case]] = field(default_factory=dict)
    frontier: Mapping[float, Sequence[Case]] = field(default_factory=dict)
    text: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    general: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    @property
    def cases(self) -> Sequence[Case]:
        """Those of the run with the most edits: of single edits, all there are."""
        return self.runs[-1].cases

    def beside(self, run: Run) -> dict[str, dict[str, dict[str, Summary]]]:
        """The baselines' metrics for the same requests as a run's: it may have taken the first of them only."""
        return {name: metrics_of(cases[: len(run.cases)]) for name, cases in self.baselines.items()}

    def metrics(self) -> dict[str, dict[str, Summary]]:
        """Each metric of that run, by mode. One without data is absent, never 0."""
        return metrics_of(self.cases)

    def frontier_metrics(self) -> dict[float, dict[str, dict[str, Summary]]]:
        """The same at each scale of the frontier."""
        return {scale: metrics_of(cases) for scale, cases in self.frontier.items()}

    def retention(self) -> list[list[float]]:
        """Of sequential edits, for each run the share of its own prompt that each edit made so far still answers.

        Row j, column i: 1 if edit i is still there after the edits of run j, else 0; rows grow from run to run.
        """
        if self.protocol != "sequential":
            return []
        return [[case.values["reliability"]["generated"] for case in run.cases] for run in self.runs]

    def to_json(self) -> dict[str, Any]:
        """The report as an object of :data:`SCHEMA`."""
        at_scales = {scale: _as_json(metrics) for scale, metrics in self.frontier_metrics().items()}
        return {
            "schema": SCHEMA,
            "model": self.model,
            "data": self.data,
            "editor": self.editor,
            "protocol": self.protocol,
            "runs": [
                {
                    "edits": run.edits,
                    "seconds_per_edit": run.seconds_per_edit,
                    "metrics": _as_json(run.metrics()),
                    "cases": [case.to_json() for case in run.cases],
                }
                for run in self.runs
            ],
            "baselines": {
                name: {"metrics": _as_json(metrics_of(cases)), "cases": [case.to_json() for case in cases]}
                for name, cases in self.baselines.items()
            },
            "frontier": [{"scale": scale, "metrics": metrics} for scale, metrics in at_scales.items()],
            "retention": self.retention(),
            "text": dict(self.text),
            "settings": dict(self.settings),
            "left_out": dict(self.left_out),
            "general": {
                task: {metric: dict(both) for metric, both in own.items()} for task, own in self.general.items()
            },
            "peak_memory_bytes": peak_memory(),
            "environment": dict(self.environment),
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_json(path, self.to_json())


def metrics_of(cases: Sequence[Case]) -> dict[str, dict[str, Summary]]:
    """The mean over edits of each metric that has data, by mode."""
    found: dict[str, dict[str, Summary]] = {}
    names = dict.fromkeys(name for case in cases for name in case.values)
    for name in sorted(names, key=_order):
        having = [case.values[name] for case in cases if name in case.values]
        modes = dict.fromkeys(mode for values in having for mode in values)
        found[name] = {mode: Summary.of([values[mode] for values in having if mode in values]) for mode in modes}
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
