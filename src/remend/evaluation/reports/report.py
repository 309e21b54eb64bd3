"""``Report``: the results of an evaluation, means over edits with confidence intervals, as one JSON object."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import remend
from remend.evaluation.before_after import AnswerComparison
from remend.evaluation.reports.metric_titles import in_order
from remend.evaluation.summary import Summary
from remend.saved_folders import write_json

SCHEMA = "remend.report/2"


@dataclass(frozen=True)
class Case:
    """The result for one edit: the value of each metric that its request has data for, by mode.

    Attributes:
        id: the request's id, or its number in the file.
        prompt: the edited prompt, a conversation as people read it.
        target: the expected answer.
        before: the unedited model's own answer.
        values: metric → mode → value. Modes are ``teacher_forced``, ``token_accuracy``, ``generated``, ``contains`` and
            ``token_f1``, or ``value`` where there is one only.
        about: properties by which results are broken down: ``relation``, ``target_tokens``, and ``confidence``, the
            probability of the unedited model's own answer.
        answers: every prompt's answer before and after.
        intervals: the 95 % interval over texts of each metric that is a mean over those.
    """

    id: str | int
    prompt: str
    target: str
    before: str
    values: Mapping[str, Mapping[str, float]]
    about: Mapping[str, str | float] = field(default_factory=dict)
    answers: Sequence[AnswerComparison] = ()
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the case as an object of the report."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "target": self.target,
            "before": self.before,
            "about": dict(self.about),
            "values": {name: dict(modes) for name, modes in self.values.items()},
            "answers": [answer.to_json() for answer in self.answers],
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Case:
        """Make the case of such an object, which must have been validated."""
        answers = tuple(AnswerComparison(**answer) for answer in content["answers"])
        intervals = {name: (low, high) for name, (low, high) in content["intervals"].items()}
        return Case(**{**content, "answers": answers, "intervals": intervals})


@dataclass(frozen=True)
class Run:
    """The results with a number of edits applied at once.

    Attributes:
        edits: how many are applied.
        cases: the case of each edit.
        seconds_per_edit: wall time of making an edit, without its evaluation.
        abilities: of what the unedited model gets right, the share that stays right, by ability
            (:mod:`remend.evaluation.abilities`), if it was measured.
    """

    edits: int
    cases: Sequence[Case]
    seconds_per_edit: float
    abilities: Mapping[str, Summary] = field(default_factory=dict)

    def metrics(self) -> dict[str, dict[str, Summary]]:
        """Return each metric that has data, by mode. One without data is absent, never 0."""
        return metrics_of(self.cases)


@dataclass(frozen=True)
class Report:
    """The results of :func:`remend.evaluate`.

    Attributes:
        model: the name of the edited model.
        data: where the requests come from.
        editor: the name of the editor.
        protocol: ``single``, ``batched``, ``sequential``, or ``checkpoints`` where two models were given.
        runs: the results for each number of edits that were applied at once; of single edits there is one run.
        baselines: what the edits are compared with: the results without any edit (``unedited``), with the fact in the
            prompt (``in_context``), and of single edits with inexact numbers (``noise_10%``, ``mask_10%``).
        frontier: the cases of single edits at other strengths, by strength, if they were evaluated.
        text: of the ordinary text that edits were measured on: ``texts``, ``tokens``, whether it was ``given`` and, of
            causal models, its ``perplexity`` before any edit.
        settings: further settings, such as ``seed`` and ``limit`` of the command line.
        left_out: how many requests or prompts were not evaluated, by reason.
        environment: versions, device and threads.
        general: scores in lm-eval's tasks, if they were measured: task → metric → ``before`` and ``after``.
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
    def text_in_words(self) -> str:
        """The ordinary text that edits were measured on, in words; of older reports, as far as they say it."""
        text = self.text
        whose = "" if text.get("given", True) else ", which the model wrote itself"
        parts = [f"{text['texts']:.0f} texts{whose}"] if "texts" in text else []
        parts += [f"{text['tokens']:,.0f} choices"] if "tokens" in text else []
        parts += [f"perplexity {text['perplexity']:.2f} before any edit"] if "perplexity" in text else []
        return ", ".join(parts)

    @property
    def cases(self) -> Sequence[Case]:
        """The cases of the run with the most edits: of single edits, all there are."""
        return self.runs[-1].cases

    def baseline_metrics(self, run: Run) -> dict[str, dict[str, dict[str, Summary]]]:
        """Return the metrics of each baseline for the requests of a run, which may be the first of them only."""
        return {name: metrics_of(cases[: len(run.cases)]) for name, cases in self.baselines.items()}

    def metrics(self) -> dict[str, dict[str, Summary]]:
        """Return each metric of the run with the most edits, by mode. One without data is absent, never 0."""
        return metrics_of(self.cases)

    def frontier_metrics(self) -> dict[float, dict[str, dict[str, Summary]]]:
        """Return the metrics at each strength of the frontier."""
        return {strength: metrics_of(cases) for strength, cases in self.frontier.items()}

    def retention(self) -> list[list[float]]:
        """Return which sequential edits are retained as others follow; nothing for other protocols.

        Row j, column i: 1 if the prompt of edit i is answered with its target after the edits of run j, else 0. Rows
        grow from run to run.
        """
        if self.protocol != "sequential":
            return []
        return [[case.values["reliability"]["generated"] for case in run.cases] for run in self.runs]

    def to_json(self) -> dict[str, Any]:
        """Return the report as an object of :data:`SCHEMA`."""
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
                    **({"abilities": summaries_as_json(run.abilities)} if run.abilities else {}),
                }
                for run in self.runs
            ],
            "baselines": {
                name: {"metrics": _as_json(metrics_of(cases)), "cases": [case.to_json() for case in cases]}
                for name, cases in self.baselines.items()
            },
            "frontier": [
                {"scale": strength, "metrics": _as_json(metrics)}
                for strength, metrics in self.frontier_metrics().items()
            ],
            "retention": self.retention(),
            "text": dict(self.text),
            "settings": dict(self.settings),
            "left_out": dict(self.left_out),
            "general": {
                task: {metric: dict(scores) for metric, scores in by_metric.items()}
                for task, by_metric in self.general.items()
            },
            "peak_memory_bytes": peak_memory(),
            "environment": dict(self.environment),
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_json(path, self.to_json())


def metrics_of(cases: Sequence[Case]) -> dict[str, dict[str, Summary]]:
    """Return the mean over edits of each metric that has data, by mode, in the order of the registry.

    What was measured once, for all edits of the cases together, has its interval over texts.
    """
    metrics: dict[str, dict[str, Summary]] = {}
    for name in in_order(list(dict.fromkeys(name for case in cases for name in case.values))):
        of_cases = [case.values[name] for case in cases if name in case.values]
        modes = dict.fromkeys(mode for values in of_cases for mode in values)
        metrics[name] = {mode: Summary.of([values[mode] for values in of_cases if mode in values]) for mode in modes}
        intervals = [case.intervals[name] for case in cases if name in case.intervals]
        if len(intervals) == len(of_cases) == 1:
            metrics[name] = {mode: replace(summary, ci95=intervals[0]) for mode, summary in metrics[name].items()}
    return metrics


def _as_json(metrics: Mapping[str, Mapping[str, Summary]]) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: summaries_as_json(modes) for name, modes in metrics.items()}


def summaries_as_json(summaries: Mapping[str, Summary]) -> dict[str, dict[str, Any]]:
    """Return summaries as an object of the report."""
    return {name: {"mean": s.mean, "ci95": list(s.ci95), "n": s.n} for name, s in summaries.items()}


def summaries_from_json(content: Mapping[str, Mapping[str, Any]]) -> dict[str, Summary]:
    """Make the summaries of such an object, which must have been validated."""
    return {name: Summary(s["mean"], (s["ci95"][0], s["ci95"][1]), s["n"]) for name, s in content.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """Return what figures depend on besides the code: versions, processor or GPU, threads."""
    return {
        "remend": remend.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def peak_memory() -> int | None:
    """Return the peak memory of this process in bytes: the GPU's where one is used, else resident memory.

    None where the system does not report it (Windows).
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
