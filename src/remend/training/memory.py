"""How much memory training takes, known before it starts; and the micro-batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remend.core.layers import expert_count
from remend.core.low_rank import LowRank
from remend.core.sketching import sketch_width
from remend.errors import ConfigError
from remend.fingerprint import find_modules
from remend.training.tensor_store import TensorStore

if TYPE_CHECKING:
    from remend.editors.mend.editor import Mend
    from remend.training.trainer import Trainer

CPU_MICRO_BATCH = 8
"""Where memory is not the question: on a CPU larger parts only make for larger buffers."""
FREE_SHARE = 0.9
"""The share of a GPU's free memory that is counted on."""
PROBED = 2
"""Episodes of a batch, its longest, that are run to see what a pass keeps."""


@dataclass(frozen=True)
class Estimate:
    """The bytes that training takes when it takes most, by what they are for.

    Attributes:
        process: the interpreter and its libraries (on a CPU).
        model: the base model's weights.
        editor: the editor networks and what they measured of the model.
        optimiser: Adam's two moments, the one gradient buffer, and the best state so far (on a CPU).
        constants: what is kept of each example.
        editor_pass: activations of the editor networks, for a whole batch.
        model_pass: activations of the edited model, for a micro-batch.
        calibration: what measuring the layers' inputs takes before the first step, beyond the above.
    """

    process: int
    model: int
    editor: int
    optimiser: int
    constants: int
    editor_pass: int
    model_pass: int
    calibration: int

    @property
    def total(self) -> int:
        """The most that is taken at any time."""
        lasting = self.process + self.model + self.editor + self.constants
        return lasting + max(self.optimiser + self.editor_pass + self.model_pass, self.calibration + self.model_pass)

    def parts(self) -> dict[str, int]:
        """Each part by name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class _Needs:
    """What the estimate is made of: the fixed parts, and what a micro-batch of some size takes."""

    fixed: Estimate
    an_episode: float

    def estimate(self, micro_batch: int) -> Estimate:
        parts = self.fixed.parts()
        return Estimate(**{**parts, "model_pass": int(self.an_episode * micro_batch)})


def estimate(trainer: Trainer) -> Estimate:
    """What ``trainer`` will take, with its present micro-batch; measured on a few of its own longest episodes."""
    return _needs(trainer).estimate(trainer.micro_batch)


def fitting_micro_batch(trainer: Trainer) -> int:
    """The largest micro-batch that fits the memory that training may take.

    Raises:
        ConfigError: not even one episode at a time does.
    """
    memory, device, batch = trainer.resources.memory, trainer.task.device, trainer.config.batch_size
    if memory is None and device.type != "cuda":
        return -(-batch // -(-batch // CPU_MICRO_BATCH))  # in as few parts, of the same size
    if memory is not None:
        limit = int(memory * 1e9)
    else:
        limit = int(FREE_SHARE * torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_allocated(device)
    needs = _needs(trainer)
    smallest = needs.estimate(1)
    if smallest.total > limit:
        parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in smallest.parts().items())
        raise ConfigError(
            f"training takes about {smallest.total / 1e9:.2f} GB with one episode at a time ({parts}), and may take "
            f"{limit / 1e9:.2f} GB: {_advice(smallest, limit)}"
        )
    return max(size for size in range(1, batch + 1) if needs.estimate(size).total <= limit)


def _advice(smallest: Estimate, limit: int) -> str:
    """How training could fit after all."""
    room = limit - (smallest.total - smallest.constants)
    if room >= 0:
        return f"keep less of the examples, a cache of {int(room / 1e7) / 100} GB (--cache)"
    return (
        f"even with a cache of 0 it takes {-room / 1e9:.2f} GB too much. Load the model in bfloat16 or quantised, edit "
        "fewer matrices, recompute activations, or (in Python) choose a smaller batch or rank"
    )


def resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    return _reported(Path("/proc/self/status"), "VmRSS") or 0


def available() -> int | None:
    """Bytes of memory that a process could still get; None where the system does not say."""
    return _reported(Path("/proc/meminfo"), "MemAvailable")


def _reported(file: Path, key: str) -> int | None:
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


def _needs(trainer: Trainer) -> _Needs:
    on_cpu = trainer.task.device.type == "cpu"
    model = bytes_of([*trainer.task.model.parameters(), *trainer.task.model.buffers()])
    parameters = list(trainer.editor.parameters())
    editor, trained = bytes_of([*parameters, *trainer.editor.buffers()]), bytes_of(parameters)
    largest = max(bytes_of([parameter]) for parameter in parameters)
    rows = _rows_an_episode(trainer)
    editor_pass, factors = 0.0, 0.0
    for key, names in trainer.editor.groups.items():
        network = trainer.editor.network(key)
        d, rank = network.d_in + network.d_out, network.first.down.shape[0]
        own = sum(rows[name] for name in names)
        # Of each row ten vectors of the width and three of the rank exist when the backward pass begins; four of what
        # the network does not read.
        vectors = 10 * network.width + 4 * (d - network.width) + 3 * rank
        editor_pass += 4 * own * vectors * trainer.config.batch_size / trainer.workers.count
        factors += 4 * own * d * len(trainer.episodes)
    fixed = Estimate(
        process=max(0, resident() - model - editor) if on_cpu else 0,
        model=model,
        editor=editor,
        optimiser=2 * trained + largest + (trained if on_cpu else 0),
        constants=int(
            trainer.constants.states.room(trainer.state_bytes()) + trainer.constants.factors.room(int(factors))
        ),
        editor_pass=int(editor_pass),
        model_pass=0,
        calibration=moments_bytes(trainer.editor),
    )
    return _Needs(fixed, _kept_an_episode(trainer, rows))


def moments_bytes(editor: Mend) -> int:
    """What the moments of the layers' inputs take that are measured before the first step."""
    if not editor.config.ridge and not editor.config.contrast:
        return 0
    inputs, keys, tests, largest = 0, 0, {}, 0
    for name, (d, _) in editor.shapes.items():
        k = editor.directions.get(name)
        columns = sketch_width(d, k) if k else d
        inputs += d * columns if editor.config.ridge else 0
        keys += 6 * (k + 1 if k else d) ** 2 if editor.config.contrast else 0
        tests[d] = d * columns if k else 0  # matrices of one width share the random vectors
        largest = max(largest, d * columns)
    # Those of inputs and those of keys exist one after the other; then one decomposition's workspace.
    return 4 * max(inputs + sum(tests.values()), keys) + 4 * 8 * largest


def _rows_an_episode(trainer: Trainer) -> dict[str, float]:
    """How many tokens of an edit carry gradient at each matrix, on average over some edits."""
    pairs = trainer.episodes.batch(0, min(trainer.config.batch_size, CPU_MICRO_BATCH)).edits
    factors = trainer.constants.beside(TensorStore(0), TensorStore(0)).gradient_factors(pairs)
    return {name: int(own.active.sum()) / len(pairs) for name, own in factors.items()}


def _kept_an_episode(trainer: Trainer, rows: dict[str, float]) -> float:
    """Bytes that one of the longest episodes adds to a pass through the edited model, its backward pass included."""
    batch = trainer.episodes.longest(PROBED)
    modules, changes = find_modules(trainer.task.model, trainer.editor.shapes), {}
    for name, (d_in, d_out) in trainer.editor.shapes.items():
        rank = max(1, round(rows[name]))
        u, delta = (
            torch.zeros(PROBED, rank, d, device=trainer.editor.device, requires_grad=True) for d in (d_in, d_out)
        )
        own = expert_count(modules[name])
        experts = torch.zeros(PROBED, rank, dtype=torch.long, device=u.device) if own else None
        changes[name] = LowRank(u, delta, experts=experts)
    weights = {tensor.untyped_storage().data_ptr() for tensor in trainer.task.model.parameters()}
    kept = _saved_bytes(lambda: trainer.edited_losses(batch, changes, backward=True), weights)
    targets = max(sum(len(pair.target) for pair in pairs) for pairs in (batch.neighbours, batch.locality))
    return (
        kept + 4 * 4 * targets * trainer.task.output_size
    ) / PROBED  # logits of both models, their gradient, and a copy


def _saved_bytes(action: Callable[[], object], own: set[int]) -> int:
    """Bytes of the storages that autograd keeps while ``action`` runs, those in ``own`` left out."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        action()
    return sum(sizes.values())


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """What tensors take, also those without memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
