"""What a model can do beside the edited facts: tasks of lm-evaluation-harness, before and after."""

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
from torch import nn

from remend.core.hooks import frozen
from remend.errors import ConfigError, NonFiniteError
from remend.evaluation.reports.report import Report
from remend.tasks import Task

ROWS_AT_ONCE = 16

Scores = dict[str, dict[str, float]]
"""Task → metric → value."""


@dataclass(frozen=True)
class LmEvalTasks:
    """Tasks that a model is examined in by lm-evaluation-harness (lm-eval), as the package itself does it.

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
                f"general ability is measured with {' and '.join(missing)}, not installed here: pip install "
                "'remend[lm-eval]', or leave --lm-eval away"
            )
        if not self.tasks or not all(self.tasks):
            raise ConfigError(f"tasks are names such as arc_easy,hellaswag, not {','.join(self.tasks)!r} (--lm-eval)")
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is no folder: name the one that holds the tasks' YAML files")

    @cached_property
    def _loaded(self) -> tuple[Any, list[Any]]:
        """lm-eval's index of all tasks, and those that were named, with their data."""
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=None if self.folder is None else str(self.folder))
        for name in self.tasks:
            if name not in manager.all_tasks:
                near = get_close_matches(name, manager.all_tasks, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists its own"
                raise ConfigError(f"lm-eval has no task {name!r}; {hint} (--lm-eval-path adds those of a folder)")
        try:
            found = manager.load(list(self.tasks))
        except Exception as error:  # a task is anyone's YAML, code and data: whatever is wrong with it is told
            raise ConfigError(
                f"lm-eval cannot load {', '.join(self.tasks)} ({type(error).__name__}: {error}): see that the task's "
                "data are there, or can be fetched"
            ) from error
        groups = [found["groups"][name] for name in self.tasks if name in found["groups"]]
        inside = {task.task_name for group in groups for task in group.get_all_tasks()}
        return manager, groups + [task for name, task in found["tasks"].items() if name not in inside]

    def measure(self, task: Task) -> Scores:
        """How well a model does, by task and metric; a filter of lm-eval's stands behind the metric's name.

        Both the model, with whatever edit is applied, and its tokenizer stay as they are, and so do random draws.

        Raises:
            ConfigError: the model is a classifier, or lm-eval does not know a task or cannot load it.
            NonFiniteError: a metric is NaN or infinite.
        """
        if not isinstance(task.model.get_output_embeddings(), nn.Module):
            raise ConfigError(
                f"lm-eval examines language models; {type(task.model).__name__} is a classifier: leave --lm-eval away"
            )
        from lm_eval import simple_evaluate

        with frozen(task.model), _own_randomness():
            manager, tasks = self._loaded
            found = simple_evaluate(
                _wrapped(task), tasks=tasks, task_manager=manager, limit=self.limit,
                bootstrap_iters=0, log_samples=False,
            )  # fmt: skip
        return {task: _numbers(task, values) for task, values in found["results"].items()}


def before_after(before: Scores, after: Scores) -> dict[str, dict[str, dict[str, float]]]:
    """Task → metric → ``before`` and ``after``, as a report has it."""
    return {
        task: {metric: {"before": value, "after": after[task][metric]} for metric, value in values.items()}
        for task, values in before.items()
    }


def after_what(report: Report) -> str:
    """Which edits a report's general ability was measured after."""
    edits = report.runs[-1].edits
    return {
        "single": "the first edit alone",
        "batched": f"the last {edits} edits at once",
        "sequential": f"{edits} edits one after another",
        "checkpoints": "all edits, in the other checkpoint",
    }[report.protocol]


def _wrapped(task: Task) -> Any:
    """The model as lm-eval takes it. The tokenizer is a copy, since it may be given a padding token."""
    from lm_eval.models.huggingface import HFLM

    backend = "seq2seq" if getattr(task.model.config, "is_encoder_decoder", False) else "causal"
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that the model is loaded already, which is what is wanted
    try:
        return HFLM(
            pretrained=task.model, tokenizer=copy.deepcopy(task.processor), backend=backend, batch_size=ROWS_AT_ONCE
        )
    finally:
        logger.setLevel(level)


def _numbers(task: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among what lm-eval tells of a task, which are named ``metric,filter``."""
    found = {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and "_stderr," not in name
    }
    if wrong := [name for name, value in found.items() if not math.isfinite(value)]:
        raise NonFiniteError(f"lm-eval found {found[wrong[0]]} for {wrong[0]} of {task}: no such model can be judged")
    return found


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Within it random numbers may be seeded anew; afterwards they go on as if nothing had been drawn."""
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
