"""Examining a model before an editor is trained for it: what would be edited, what it takes, whether it works."""

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
from remend.request import EditRequest
from remend.tasks.base import Batch, Task
from remend.tasks.generative import GenerativeTask
from remend.training.config import PRESETS, Resources, TrainingConfig
from remend.training.memory import Estimate, available, estimate, resident
from remend.training.trainer import Trainer

DOZEN = 12
"""Requests of the self-test."""
TEST_SECONDS = 20.0
TEST_STEPS = 12
TIMED_EDITS = 3


@dataclass(frozen=True)
class Check:
    """One thing that was tried; ``passed`` is None where it does not apply."""

    name: str
    passed: bool | None
    found: str


@dataclass(frozen=True)
class PreflightReport:
    """What :func:`examine` found.

    Attributes:
        model: what the model was loaded as.
        matrices: (d_in, d_out) of each matrix that would be edited, by name.
        reason: why these.
        editor_parameters: of the editor networks.
        memory: what training takes at most, with the settings asked for.
        training_seconds: for a thousand episodes that are new to it; None where the self-test did not get so far.
        edit_seconds: for one edit, of one prompt; None likewise.
        checks: the self-test.
        advice: sentences.
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
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
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
    """Look at a model as training would, and try everything once on a dozen requests; the model is left as it was.

    Args:
        task: the base model.
        requests: a few like those to train on; their lengths decide about time and memory.
        preset: network and training settings that are meant.
        modules: globs or regular expressions of the matrices to edit.
        resources: how training would use memory and precision.
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
    chosen = replace(settings, batch_size=min(settings.batch_size, DOZEN))
    memory = estimate(Trainer(task, editor, requests, settings, resources))
    test = _SelfTest(task, editor, requests[:DOZEN], chosen, resources, on_check)
    with resources.products():
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
    """Trains a fresh editor for a few steps, makes an edit with it, and takes that back."""

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
        # The rates of the default preset: whether the machinery learns shows within a few steps.
        rates = PRESETS["default"][1]
        rated = replace(settings, learning_rate=rates.learning_rate, alpha_learning_rate=rates.alpha_learning_rate)
        # Nothing is kept: after one step all of a dozen requests would be known, and the time that of later epochs.
        forgetful = replace(resources, cache=0.0, cache_folder=None)
        self.trainer = Trainer(task, editor, requests, replace(rated, decay=False), forgetful)
        self.on_check = on_check
        self.checks: list[Check] = []
        self.training_seconds: float | None = None
        self.edit_seconds: float | None = None

    def run(self) -> None:
        below, blocks = self.trainer.prefix.depth, len(self.trainer.prefix.blocks)
        if blocks:
            self._note("frozen blocks run once", True, f"{below} of {blocks} for each example, the others in each pass")
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
        dozen = trainer.episodes.fixed(trainer.config.batch_size)
        before = trainer.validate(dozen)["loss"]
        taken: list[float] = []
        began = time.monotonic()
        while len(taken) < TEST_STEPS and (len(taken) < 3 or time.monotonic() - began < TEST_SECONDS):
            start = time.perf_counter()
            trainer.train_step()
            taken.append(time.perf_counter() - start)
        self.training_seconds = 1_000 * sorted(taken)[len(taken) // 2] / trainer.config.batch_size
        self._note("a gradient reaches every tensor", True, f"of the editor's {len(trainer.optimiser.names)}")
        after = trainer.validate(dozen)["loss"]
        self._note("the loss falls", after < before, f"{before:.3f} → {after:.3f} in {len(taken)} steps")

    @torch.no_grad()
    def _edit(self) -> None:
        task, request = self.task, self.requests[0]
        batch = task.collate([task.encode(request.prompt, request.target)])
        untouched = task.outputs(batch)
        taken = []
        for _ in range(TIMED_EDITS):
            start = time.perf_counter()
            edit = self.editor.edit(task, [request])
            taken.append(time.perf_counter() - start)
        self.edit_seconds = sorted(taken)[TIMED_EDITS // 2]
        with edit.applied(task.model):
            applied = task.outputs(batch)
        moved = float((applied - untouched).abs().max())
        same = torch.equal(task.outputs(batch), untouched)
        self._note("an edit acts", moved > 0, f"logits move by up to {moved:.3g}")
        self._note("reverting leaves the model bit-identical", same, "the same logits as before")
        self._merge(edit, batch, applied, untouched)

    def _merge(self, edit: Edit, batch: Batch, applied: torch.Tensor, untouched: torch.Tensor) -> None:
        name = "as a side branch and merged, an edit does the same"
        try:
            handle = edit.merge(self.task.model)
        except (PrecisionError, EditError) as error:
            self._note(name, None, f"it cannot be merged here: {str(error).split('. ')[0]}")
            return
        merged = self.task.outputs(batch)
        handle.revert()
        apart = float((merged - applied).float().norm() / (applied - untouched).float().norm().clamp(min=1e-30))
        bound = 1e-2 if applied.dtype == torch.float32 else 0.5  # what is merged is rounded to the weights' dtype
        self._note(name, apart < bound, f"{apart:.2g} of the change apart")

    def _note(self, name: str, passed: bool | None, found: str) -> None:
        self.checks.append(Check(name, passed, found))
        self.on_check(self.checks[-1])


def _reason(model: PreTrainedModel, editor: Mend, modules: Sequence[str], layers: str | None) -> str:
    """Why these matrices."""
    if modules:
        return f"they match {' '.join(modules)}" + (f" in the blocks {layers}" if layers else "")
    every = [prefix for _, stack in find_stacks(model) for prefix, _ in stack]
    chosen = [prefix for prefix in every if any(is_inside(name, prefix) for name in editor.shapes)]
    what = "the MLPs' output matrices" if editor.config.outputs_only else "the MLPs"
    if layers:
        return f"{what} of {len(chosen)} of {len(every)} blocks ({layers})"
    if len(find_stacks(model)) > 1:
        return f"{what} of {len(chosen)} of {len(every)} blocks, the last of encoder or decoder"
    return f"{what} of the last {len(chosen)} of {len(every)} blocks"


def _advice(task: Task, editor: Mend, resources: Resources, memory: Estimate) -> list[str]:
    model, device = task.model, execution_device(task.model)
    quantised = any(map(is_quantized, find_modules(model, editor.shapes).values()))
    found = []
    if device.type == "cpu" and torch.cuda.is_available():
        found.append("There is a GPU that is not used: --device cuda.")
    if device.type == "cuda" and resources.precision == "float32" and torch.cuda.get_device_capability()[0] >= 8:
        found.append("Editor networks are several times faster here with --precision tf32 (or bfloat16).")
    if device.type == "cuda" and model.dtype == torch.float32:
        found.append("In --dtype bfloat16 the model takes half the memory and runs faster.")
    if device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16) and not quantised:
        found.append("On many CPUs half precision is slower than --dtype float32, which takes twice the memory.")
    if model.dtype == torch.float16:
        found.append("float16 overflows easily: prefer --dtype bfloat16, or float32.")
    if isinstance(task, GenerativeTask) and not task.end_tokens:
        found.append("The tokenizer has no end token: an edited answer will not end by itself.")
    if editor.directions:
        widest, k = max(d_in for d_in, _ in editor.shapes.values()), max(editor.directions.values())
        found.append(f"Of inputs {widest:,} wide, {k:,} directions are told apart; the others are taken to be alike.")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available()
    if free is not None and memory.total - (resident() if device.type == "cpu" else memory.model) > free:
        found.append(
            "Training will not fit: --memory chooses smaller micro-batches; or see --recompute and --quantise."
        )
    return found
