"""Estimates the memory that training takes before it starts, and chooses the micro-batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from remend.core.layers import expert_count
from remend.core.low_rank import LowRank
from remend.editors.trainable import TrainableEditor
from remend.errors import ConfigError
from remend.fingerprint import find_modules
from remend.tasks.base import Task
from remend.training.activation_cache import ActivationCache, state_bytes
from remend.training.config import Resources, TrainingConfig
from remend.training.episodes import EpisodeBatch, Episodes
from remend.training.tensor_store import TensorStore

CPU_MICRO_BATCH = 8
"""The largest micro-batch on a CPU without a limit: larger ones are no faster there, and need larger buffers."""
FREE_SHARE = 0.9
"""The share of a GPU's free memory that training may take."""
MEASURED_EPISODES = 2
"""The number of episodes, of the longest examples, that are run to measure what autograd saves."""


@dataclass(frozen=True)
class Estimate:
    """The bytes that training takes at most, by purpose.

    Attributes:
        process: the interpreter and its libraries (on a CPU).
        model: the base model's weights.
        editor: the editor's parameters and statistics.
        optimizer: Adam's two moments, the one dense gradient, and the best parameters so far (on a CPU).
        activation_cache: what is cached of the examples.
        editor_pass: activations of the editor networks, for a whole batch.
        model_pass: activations of the edited model, for a micro-batch.
        calibration: the moments of the layers' inputs before the first step.
    """

    process: int
    model: int
    editor: int
    optimizer: int
    activation_cache: int
    editor_pass: int
    model_pass: int
    calibration: int

    @property
    def total(self) -> int:
        """The most that is taken at any time."""
        always = self.process + self.model + self.editor + self.activation_cache
        return always + max(self.optimizer + self.editor_pass + self.model_pass, self.calibration + self.model_pass)

    def parts(self) -> dict[str, int]:
        """Return each part by name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class MemoryModel:
    """The memory that training takes as a function of the micro-batch.

    Attributes:
        fixed: the parts that do not depend on it.
        episode_bytes: what each episode of a micro-batch adds to the pass through the edited model.
    """

    fixed: Estimate
    episode_bytes: float

    def estimate(self, micro_batch: int) -> Estimate:
        """Return the estimate for a micro-batch."""
        parts = self.fixed.parts()
        return Estimate(**{**parts, "model_pass": int(self.episode_bytes * micro_batch)})


class MemoryEstimator:
    """Measures the memory of a training run on a few of its own longest episodes.

    Args:
        task: the base model.
        editor: the editor in training.
        episodes: the training set.
        activation_cache: what is cached of it.
        config: the settings of the run.
        process_count: the number of processes among which a batch is divided.
        run_backward: runs the edited model forward and backward on a batch of episodes, with the given changes.
    """

    def __init__(
        self,
        task: Task,
        editor: TrainableEditor,
        episodes: Episodes,
        activation_cache: ActivationCache,
        config: TrainingConfig,
        process_count: int,
        run_backward: Callable[[EpisodeBatch, Mapping[str, LowRank]], object],
    ) -> None:
        self.task, self.editor, self.episodes, self.activation_cache = task, editor, episodes, activation_cache
        self.config, self.process_count, self.run_backward = config, process_count, run_backward

    def measure(self) -> MemoryModel:
        """Run a few episodes and return the memory as a function of the micro-batch."""
        task, editor = self.task, self.editor
        on_cpu = task.device.type == "cpu"
        model = bytes_of([*task.model.parameters(), *task.model.buffers()])
        parameters = list(editor.parameters())
        editor_size, trained = bytes_of([*parameters, *editor.buffers()]), bytes_of(parameters)
        largest = max(bytes_of([parameter]) for parameter in parameters)
        ranks = self._mean_ranks()
        needs = editor.memory(ranks)
        states = state_bytes(task, self.activation_cache.prefix, self.episodes.pairs())
        factors = int(needs.cached_factors * len(self.episodes))
        fixed = Estimate(
            process=max(0, resident_bytes() - model - editor_size) if on_cpu else 0,
            model=model,
            editor=editor_size,
            optimizer=2 * trained + largest + (trained if on_cpu else 0),
            activation_cache=int(
                self.activation_cache.states.memory_for(states) + self.activation_cache.factors.memory_for(factors)
            ),
            editor_pass=int(needs.activations * self.config.batch_size / self.process_count),
            model_pass=0,
            calibration=editor.calibration_bytes(),
        )
        return MemoryModel(fixed, self._episode_bytes(ranks))

    def _mean_ranks(self) -> dict[str, float]:
        """Return how many tokens of an edit carry gradient at each matrix, on average over some edits."""
        examples = self.episodes.batch(0, min(self.config.batch_size, CPU_MICRO_BATCH)).edits
        # Without storing anything: what is cached must not depend on whether memory was estimated.
        uncached = self.activation_cache.with_stores(TensorStore(0), TensorStore(0))
        factors = uncached.gradient_factors(examples)
        return {name: int(factor.active.sum()) / len(examples) for name, factor in factors.items()}

    def _episode_bytes(self, ranks: Mapping[str, float]) -> float:
        """Return the bytes that one of the longest episodes adds to a pass through the edited model and back."""
        batch = self.episodes.longest(MEASURED_EPISODES)
        modules, changes = find_modules(self.task.model, self.editor.shapes), {}
        for name, (d_in, d_out) in self.editor.shapes.items():
            rank = max(1, round(ranks[name]))
            u, delta = (
                torch.zeros(MEASURED_EPISODES, rank, d, device=self.editor.device, requires_grad=True)
                for d in (d_in, d_out)
            )
            experts = None
            if expert_count(modules[name]):
                experts = torch.zeros(MEASURED_EPISODES, rank, dtype=torch.long, device=u.device)
            changes[name] = LowRank(u, delta, experts=experts)
        weights = {tensor.untyped_storage().data_ptr() for tensor in self.task.model.parameters()}
        saved = _saved_bytes(lambda: self.run_backward(batch, changes), weights)
        targets = max(sum(len(pair.target) for pair in pairs) for pairs in (batch.neighbours, batch.locality))
        # Beside what autograd saves: the outputs of both models in float32, their gradient, and a copy.
        return (saved + 4 * 4 * targets * self.task.output_size) / MEASURED_EPISODES


def fitting_micro_batch(
    editor: TrainableEditor, config: TrainingConfig, resources: Resources, device: torch.device, memory: MemoryEstimator
) -> int:
    """Return the largest micro-batch that fits the memory that training may take.

    Args:
        editor: the editor in training.
        config: the settings of the run.
        resources: the limit, if there is one.
        device: the model's device.
        memory: measures the run.

    Raises:
        ConfigError: not even one episode at a time fits.
    """
    batch_size, limit_gb = config.batch_size, resources.memory
    if not editor.estimates_memory:
        return batch_size
    if limit_gb is None and device.type != "cuda":
        return -(-batch_size // -(-batch_size // CPU_MICRO_BATCH))  # in as few parts, of equal size
    if limit_gb is not None:
        limit = int(limit_gb * 1e9)
    else:
        limit = int(FREE_SHARE * torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_allocated(device)
    model = memory.measure()
    smallest = model.estimate(1)
    if smallest.total > limit:
        parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in smallest.parts().items())
        raise ConfigError(
            f"training takes about {smallest.total / 1e9:.2f} GB with one episode at a time ({parts}), and may take "
            f"{limit / 1e9:.2f} GB: {_advice(smallest, limit)}"
        )
    return max(size for size in range(1, batch_size + 1) if model.estimate(size).total <= limit)


def _advice(smallest: Estimate, limit: int) -> str:
    """Return what to change so that training fits."""
    room = limit - (smallest.total - smallest.activation_cache)
    if room >= 0:
        return f"give a smaller cache of the examples, of {int(room / 1e7) / 100} GB (--cache)"
    return (
        f"even with a cache of 0 it takes {-room / 1e9:.2f} GB too much. Load the model in bfloat16 or quantised, edit "
        "fewer matrices, recompute activations, or (in Python) choose a smaller batch or rank"
    )


def resident_bytes() -> int:
    """Return the memory that this process takes; 0 where the system does not tell."""
    return _read_proc(Path("/proc/self/status"), "VmRSS") or 0


def available_bytes() -> int | None:
    """Return the memory that a process could still get; None where the system does not tell."""
    return _read_proc(Path("/proc/meminfo"), "MemAvailable")


def _read_proc(file: Path, key: str) -> int | None:
    # By hand, since psutil, which reads the same files, is no dependency of the package.
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


def _saved_bytes(action: Callable[[], object], excluded: set[int]) -> int:
    """Return the bytes of the storages that autograd saves while ``action`` runs, without those in ``excluded``."""
    sizes: dict[int, int] = {}

    # By storage: views of one tensor are saved several times and take its memory once.
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        action()
    return sum(sizes.values())


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of tensors, also of those on the ``meta`` device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
