"""``LmEvalTasks``: general ability in tasks of lm-evaluation-harness, measured before and after edits."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remend.core.low_rank_hooks import frozen
from remend.errors import ConfigError, NonFiniteError
from remend.evaluation.reports.report import Report
from remend.tasks import Task

LM_EVAL_BATCH_SIZE = 16

TaskScores = dict[str, dict[str, float]]
"""Task → metric → value."""


@dataclass(frozen=True)
class LmEvalTasks:
    """Tasks in which lm-evaluation-harness (lm-eval) evaluates a model, through that package's own functions.

    Tasks whose data are local files are read from there; lm-eval's own fetch theirs from the Hugging Face hub, once.
    No code from a hub is run, and no chat template is used.

    Args:
        tasks: names of tasks, groups or tags: lm-eval's own, or of ``folder``.
        folder: where more tasks are described, as lm-eval's YAML files.
        limit: how many samples of each task, at most; by default all.

    Raises:
        ConfigError: lm-eval or accelerate is not installed, there is no such folder, or no task is named.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if missing := [package for package in ("lm_eval", "accelerate") if find_spec(package) is None]:
            raise ConfigError(
                f"general ability is measured with {' and '.join(missing)}, which is not installed: run pip install "
                "'remend[lm-eval]', or omit --lm-eval"
            )
        if not self.tasks or not all(self.tasks):
            raise ConfigError(
                f"--lm-eval takes names of tasks such as arc_easy,hellaswag, not {','.join(self.tasks)!r}"
            )
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(
                f"{self.folder} is not a folder: --lm-eval-path takes the folder that holds the YAML files of tasks"
            )

    @cached_property
    def _loaded(self) -> tuple[Any, list[Any]]:
        """lm-eval's index of all tasks, and the named ones, loaded with their data."""
        from lm_eval.tasks import TaskManager

        # The index of all tasks takes seconds, so it is made once for both measurements.
        manager = TaskManager(include_path=None if self.folder is None else str(self.folder))
        for name in self.tasks:
            if name not in manager.all_tasks:
                near = get_close_matches(name, manager.all_tasks, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists its tasks"
                raise ConfigError(f"lm-eval has no task {name!r}; {hint} (--lm-eval-path adds the tasks of a folder)")
        try:
            loaded = manager.load(list(self.tasks))
        except Exception as error:  # a task is anybody's YAML, code and data, and may raise anything
            raise ConfigError(
                f"lm-eval cannot load {', '.join(self.tasks)} ({type(error).__name__}: {error}): check that the "
                "data of the task are there, or can be downloaded"
            ) from error
        # lm-eval lists the tasks of a group once more beside it; passed on as they are, they would be measured twice.
        groups = [loaded["groups"][name] for name in self.tasks if name in loaded["groups"]]
        in_groups = {task.task_name for group in groups for task in group.get_all_tasks()}
        return manager, groups + [task for name, task in loaded["tasks"].items() if name not in in_groups]

    def measure(self, task: Task) -> TaskScores:
        """Return the model's scores by task and metric; the name of an lm-eval filter follows that of the metric.

        The model, with whatever edit is applied, its tokenizer and the state of random draws stay as they are.

        Raises:
            ConfigError: the model is a classifier, or lm-eval does not know a task or cannot load it.
            NonFiniteError: a metric is NaN or infinite.
        """
        if not task.generates:
            raise ConfigError(
                f"lm-eval evaluates language models; {type(task.model).__name__} writes no text: omit --lm-eval"
            )
        from lm_eval import simple_evaluate

        # No bootstrap, since lm-eval's standard errors are not reported.
        with frozen(task.model), _random_state_restored():
            manager, tasks = self._loaded
            results = simple_evaluate(
                _as_lm_eval_model(task), tasks=tasks, task_manager=manager, limit=self.limit,
                bootstrap_iters=0, log_samples=False,
            )  # fmt: skip
        return {name: _metric_values(name, values) for name, values in results["results"].items()}


def pair_scores(before: TaskScores, after: TaskScores) -> dict[str, dict[str, dict[str, float]]]:
    """Return task → metric → ``before`` and ``after``, as reports hold it."""
    return {
        task: {metric: {"before": value, "after": after[task][metric]} for metric, value in values.items()}
        for task, values in before.items()
    }


def edits_of_scores(report: Report) -> str:
    """Say after which edits the general ability in a report was measured."""
    edits = report.runs[-1].edits
    return {
        "single": "the first edit alone",
        "batched": f"the last {edits} edits at once",
        "sequential": f"{edits} edits one after another",
        "checkpoints": "all edits, in the other checkpoint",
    }[report.protocol]


def _as_lm_eval_model(task: Task) -> Any:
    """Return the model in lm-eval's class for transformers models."""
    from lm_eval.models.huggingface import HFLM

    backend = "seq2seq" if getattr(task.model.config, "is_encoder_decoder", False) else "causal"
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that the model is loaded already, as intended here
    try:
        return HFLM(
            pretrained=task.model,
            tokenizer=copy.deepcopy(task.processor),  # lm-eval may add a padding token to it
            backend=backend,
            batch_size=LM_EVAL_BATCH_SIZE,
        )
    finally:
        logger.setLevel(level)


def _metric_values(task: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among lm-eval's results for a task, whose names are ``metric,filter``."""
    scores = {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and "_stderr," not in name  # the rest describes the task
    }
    if wrong := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise NonFiniteError(
            f"lm-eval returned {scores[wrong[0]]} for {wrong[0]} of {task}: the model's outputs are not finite"
        )
    return scores


@contextmanager
def _random_state_restored() -> Iterator[None]:
    """Restore the random state of Python, numpy and torch afterwards: lm-eval seeds all three anew."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
