"""Examines a model before training: what would be edited, the time and memory that it takes, and a self-test."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from remend.core.layers import execution_device, is_quantized
from remend.edit import Edit
from remend.editors.mend.config import MendConfig
from remend.editors.mend.editor import Mend
from remend.errors import EditError, PrecisionError, RemendError
from remend.fingerprint import find_modules
from remend.models.blocks import find_stacks, is_inside
from remend.progress import report_progress
from remend.request import EditRequest
from remend.tasks.base import Batch, Task
from remend.training.config import PRESETS, Resources, TrainingConfig
from remend.training.episodes import with_separators
from remend.training.memory_estimate import Estimate, available_bytes, resident_bytes
from remend.training.trainer import Trainer

TEST_REQUESTS = 12
"""The number of requests of the self-test."""
TEST_SECONDS = 20.0
"""The time after which the self-test makes no more training steps, once it has made three."""
TEST_STEPS = 12
"""The largest number of its training steps."""
TIMED_EDITS = 3
"""The number of edits of which the median time is reported."""


@dataclass(frozen=True)
class Check:
    """One check of the self-test.

    Attributes:
        name: what was checked.
        passed: whether it passed; None where it does not apply.
        found: what was measured.
    """

    name: str
    passed: bool | None
    found: str


@dataclass(frozen=True)
class PreflightReport:
    """The result of :func:`examine`.

    Attributes:
        model: the name under which the model was loaded.
        matrices: (d_in, d_out) of each matrix that would be edited, by name.
        reason: why these were chosen.
        editor_parameters: the number of parameters of the editor.
        memory: the most that training takes, with the given settings.
        training_seconds: the time of a thousand episodes that are not cached; None if the self-test failed before.
        edit_seconds: the time of an edit of one prompt; None likewise.
        checks: the checks of the self-test.
        advice: sentences that say what to do differently.
    """

    model: str
    matrices: dict[str, tuple[int, int]]
    reason: str
    editor_parameters: int
    memory: Estimate
    training_seconds: float | None
    edit_seconds: float | None
    checks: tuple[Check, ...]
    advice: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether no check has failed."""
        return all(check.passed is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "model": self.model,
            "matrices": {name: list(shape) for name, shape in self.matrices.items()},
            "reason": self.reason,
            "editor_parameters": self.editor_parameters,
            "memory_bytes": {**self.memory.parts(), "total": self.memory.total},
            "training_seconds_per_1000_episodes": self.training_seconds,
            "seconds_per_edit": self.edit_seconds,
            "checks": [vars(check) for check in self.checks],
            "advice": list(self.advice),
        }


def examine(
    task: Task,
    requests: Sequence[EditRequest],
    preset: tuple[MendConfig, TrainingConfig] = PRESETS["default"],
    modules: Sequence[str] = (),
    resources: Resources | None = None,
    on_check: Callable[[Check], None] = lambda check: None,
    layers: str | None = None,
) -> PreflightReport:
    """Estimate the time and memory of training, and test it on a dozen requests; the model is left as it was.

    Args:
        task: the base model.
        requests: some requests like those to train on; time and memory depend on their lengths.
        preset: network and training settings.
        modules: globs or regular expressions of the matrices to edit.
        resources: how training uses memory and precision.
        on_check: called after each check.
        layers: the blocks to edit.

    Raises:
        ModelError: there is nothing that could be edited.
        TrainingError: fewer than two subjects in ``requests``.
    """
    network, settings = preset
    resources = resources or Resources()
    editor = Mend.create(task, network, modules=modules, layers=layers)
    task = task.with_autocast(resources.autocast)
    chosen = replace(settings, batch_size=min(settings.batch_size, TEST_REQUESTS))
    # For an estimate tokens are counted only: one space more or less does not matter, and the model is not asked.
    counted = with_separators(requests, lambda text: " ") if task.causal else requests
    memory = Trainer(task, editor, counted, settings, resources).estimate_memory()
    test = _SelfTest(task, editor, requests[:TEST_REQUESTS], chosen, resources, on_check)
    with resources.matmul_precision():
        test.run()
    return PreflightReport(
        model=editor.base.name,
        matrices=dict(editor.shapes),
        reason=_reason(task.model, editor, modules, layers),
        editor_parameters=sum(parameter.numel() for parameter in editor.parameters()),
        memory=memory,
        training_seconds=test.training_seconds,
        edit_seconds=test.edit_seconds,
        checks=tuple(test.checks),
        advice=tuple(_advice(task, editor, resources, memory)),
    )


class _SelfTest:
    """Trains a new editor for a few steps, makes an edit with it, and reverts that."""

    def __init__(
        self,
        task: Task,
        editor: Mend,
        requests: Sequence[EditRequest],
        settings: TrainingConfig,
        resources: Resources,
        on_check: Callable[[Check], None],
    ) -> None:
        self.task, self.editor, self.requests = task, editor, requests
        # With the default preset's learning rates a few steps show whether the loss falls; with the paper's none do.
        default = PRESETS["default"][1]
        settings = replace(
            settings,
            learning_rate=default.learning_rate,
            alpha_learning_rate=default.alpha_learning_rate,
            decay=False,
        )
        # Uncached: after one step the cache would hold the whole test, and times would be those of later epochs.
        uncached = replace(resources, cache=0.0, cache_folder=None)
        self.trainer = Trainer(task, editor, requests, settings, uncached)
        self.on_check = on_check
        self.checks: list[Check] = []
        self.training_seconds: float | None = None
        self.edit_seconds: float | None = None

    def run(self) -> None:
        depth, blocks = self.trainer.prefix.depth, len(self.trainer.prefix.blocks)
        if blocks:
            self._note("frozen blocks run once", True, f"{depth} of {blocks} for each example, the others in each pass")
        else:
            self._note(
                "frozen blocks run once", None, "the model cannot be entered between its blocks: slower, not wrong"
            )
        try:
            self._learn()
            self._edit()
        except RemendError as error:
            self._note("self-test", False, str(error))

    def _learn(self) -> None:
        trainer = self.trainer
        trainer.calibrate()
        held_out = trainer.episodes.fixed(trainer.config.batch_size)
        before = trainer.validate(held_out)["loss"]
        seconds: list[float] = []
        started = time.monotonic()
        while len(seconds) < TEST_STEPS and (len(seconds) < 3 or time.monotonic() - started < TEST_SECONDS):
            report_progress("trying some training steps", len(seconds), TEST_STEPS)
            start = time.perf_counter()
            trainer.train_step()
            seconds.append(time.perf_counter() - start)
        self.training_seconds = 1_000 * sorted(seconds)[len(seconds) // 2] / trainer.config.batch_size
        self._note("a gradient reaches every tensor", True, f"of the editor's {len(trainer.optimizer.names)}")
        after = trainer.validate(held_out)["loss"]
        self._note("the loss falls", after < before, f"{before:.3f} → {after:.3f} in {len(seconds)} steps")

    @torch.no_grad()
    def _edit(self) -> None:
        task, request = self.task, self.requests[0]
        batch = task.collate([task.encode(request.prompt, request.target)])
        unedited = task.outputs(batch)
        seconds = []
        for _ in range(TIMED_EDITS):
            start = time.perf_counter()
            edit = self.editor.edit(task, [request])
            seconds.append(time.perf_counter() - start)
        self.edit_seconds = sorted(seconds)[TIMED_EDITS // 2]
        with edit.applied(task.model):
            applied = task.outputs(batch)
        largest_change = float((applied - unedited).abs().max())
        same = torch.equal(task.outputs(batch), unedited)
        self._note("an edit acts", largest_change > 0, f"outputs change by up to {largest_change:.3g}")
        self._note("reverting leaves the model bit-identical", same, "the same logits as before")
        self._merge(edit, batch, applied, unedited)

    def _merge(self, edit: Edit, batch: Batch, applied: torch.Tensor, unedited: torch.Tensor) -> None:
        name = "as a side branch and merged, an edit does the same"
        try:
            handle = edit.merge(self.task.model)
        except (PrecisionError, EditError) as error:
            self._note(name, None, f"it cannot be merged here: {str(error).split('. ')[0]}")
            return
        merged = self.task.outputs(batch)
        handle.revert()
        difference = float((merged - applied).float().norm() / (applied - unedited).float().norm().clamp(min=1e-30))
        bound = 1e-2 if applied.dtype == torch.float32 else 0.5  # merged weights are rounded to the model's dtype
        self._note(name, difference < bound, f"the outputs differ by {difference:.2g} of the change")

    def _note(self, name: str, passed: bool | None, found: str) -> None:
        self.checks.append(Check(name, passed, found))
        self.on_check(self.checks[-1])


def _reason(model: PreTrainedModel, editor: Mend, modules: Sequence[str], layers: str | None) -> str:
    """Return why these matrices are edited."""
    if modules:
        return f"they match {' '.join(modules)}" + (f" in the blocks {layers}" if layers else "")
    blocks = [prefix for _, stack in find_stacks(model) for prefix, _ in stack]
    edited = [prefix for prefix in blocks if any(is_inside(name, prefix) for name in editor.shapes)]
    matrices = "the MLPs' output matrices" if editor.config.outputs_only else "the MLPs"
    if layers:
        return f"{matrices} of {len(edited)} of {len(blocks)} blocks ({layers})"
    if len(find_stacks(model)) > 1:
        return f"{matrices} of {len(edited)} of {len(blocks)} blocks, the last of encoder or decoder"
    return f"{matrices} of the last {len(edited)} of {len(blocks)} blocks"


def _advice(task: Task, editor: Mend, resources: Resources, memory: Estimate) -> list[str]:
    model, device = task.model, execution_device(task.model)
    quantized = any(map(is_quantized, find_modules(model, editor.shapes).values()))
    advice = []
    if device.type == "cpu" and torch.cuda.is_available():
        advice.append("There is a GPU that is not used: --device cuda.")
    if device.type == "cuda" and resources.precision == "float32" and torch.cuda.get_device_capability()[0] >= 8:
        advice.append("Editor networks are several times faster here with --precision tf32 (or bfloat16).")
    if device.type == "cuda" and model.dtype == torch.float32:
        advice.append("In --dtype bfloat16 the model takes half the memory and runs faster.")
    if device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16) and not quantized:
        advice.append("On many CPUs half precision is slower than --dtype float32, which takes twice the memory.")
    if model.dtype == torch.float16:
        advice.append("float16 overflows easily: prefer --dtype bfloat16, or float32.")
    if task.generates and not task.end_tokens:
        advice.append("The tokenizer has no end token: an edited answer will not end by itself.")
    if editor.directions:
        widest, k = max(d_in for d_in, _ in editor.shapes.values()), max(editor.directions.values())
        advice.append(f"Of inputs {widest:,} wide, {k:,} directions are told apart; the others are taken to be alike.")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if free is not None and memory.total - (resident_bytes() if device.type == "cpu" else memory.model) > free:
        advice.append(
            "Training will not fit: --memory chooses smaller micro-batches; or see --recompute and --quantise."
        )
    return advice
