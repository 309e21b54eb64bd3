"""Editable neural networks: the model's own matrices are trained to be easy to edit (Sinitsin et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from remend.config import Config
from remend.core.capture import explain_non_finite
from remend.core.layers import is_quantized, layer_inputs, output_rows, weight_rms
from remend.core.losses import row_mean
from remend.core.low_rank import LowRank
from remend.core.low_rank_hooks import LowRankHook, frozen, remove_hooks
from remend.editors.info import EditorInfo
from remend.editors.learned_gradient_step import GradientStepEditor
from remend.errors import ConfigError, NonFiniteError
from remend.fingerprint import ModelFingerprint, find_modules
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.base import Batch, Example, Task

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class EnnConfig(Config):
    """Settings of an ENN.

    Attributes:
        step: the initial gradient step of every matrix; 1 changes a token's output by about the output's size.
    """

    step: PositiveFloat = 0.5


class Enn(GradientStepEditor):
    """An editable neural network: the edited matrices are trained so that one gradient step edits well.

    An edit is what training changed (all of each matrix, the same for all edits) plus one step of gradient descent on
    the edit pair in the trained model, with a learned step size for each matrix. The step is differentiated with
    respect to the weights at which it is taken, so training needs second derivatives. They are taken through the
    factors of the step, u and δ as functions of the weights. So a batch of episodes trains in one pass, as in MEND, at
    the cost of a copy of the edited matrices for each. (The original trains all weights; here only the edited ones.)
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "enn", "Sinitsin et al., ICLR 2020 (arXiv 2004.00345)", "training", "dense", sequence="all"
    )
    config_class: ClassVar[type[Config]] = EnnConfig
    size: Tensor

    def __init__(self, config: EnnConfig, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(config, base, shapes)
        self.alpha = nn.Parameter(torch.full((len(self.shapes),), config.step).log())
        self.networks = nn.ParameterList(torch.zeros(min(s), max(s)) for s in self.shapes.values())
        self.register_buffer("size", torch.ones(len(self.shapes)))

    def build(self, task: Task) -> None:
        """Measure the size of each matrix: changes are trained in units of it, so that one rate suits any model."""
        for index, (name, module) in enumerate(self.edited_modules(task).items()):
            if is_quantized(module):
                raise ConfigError(f"{name} is quantised, and an ENN trains the weights themselves: use another editor")
            self.size[index] = weight_rms(module)

    def manifest_fields(self) -> dict[str, Any]:
        """Return the settings, and that each edit holds what training changed, so that edits cannot be added."""
        return {**super().manifest_fields(), "shared": True}

    def shared_rank(self, name: str) -> int:
        """Return the full rank of a matrix: all edits share what training changed."""
        return min(self.shapes[name])

    def _trained_changes(self) -> dict[str, LowRank]:
        """Return what training changed, with the identity as one factor."""
        changes = {}
        for index, (name, (d_in, d_out)) in enumerate(self.shapes.items()):
            values = self.networks[index] * self.size[index]
            identity = torch.eye(min(d_in, d_out), device=values.device)
            changes[name] = LowRank(values, identity) if d_in > d_out else LowRank(identity, values)
        return changes

    def step_changes(
        self, task: Task, examples: Sequence[Example], prefix: FrozenPrefix, states: Tensor | None
    ) -> dict[str, LowRank]:
        """Return what training changed, followed by a gradient step on each edit pair from there."""
        trained, batch = self._trained_changes(), task.collate(examples)
        u, delta = _differentiable_factors(task, batch, trained, prefix, states)
        changes = {}
        for index, (name, shared) in enumerate(trained.items()):
            shape, step = (len(examples), -1, -1), self.alpha[index].exp() * self.unit[index]
            changes[name] = LowRank(
                torch.cat([shared.u.expand(shape), u[name].to(self.device)], 1),
                torch.cat([shared.delta.expand(shape), -step * delta[name].to(self.device)], 1),
            )
        return changes


def _differentiable_factors(
    task: Task, batch: Batch, trained: Mapping[str, LowRank], prefix: FrozenPrefix, states: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return u and δ of every token of each edit pair in the trained model, as functions of the trained changes."""
    modules, training = find_modules(task.model, trained), torch.is_grad_enabled()
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    probes: dict[str, list[Tensor]] = {name: [] for name in modules}
    with ExitStack() as contexts:
        contexts.enter_context(frozen(task.model))
        contexts.enter_context(torch.enable_grad())
        contexts.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others have no second derivative
        contexts.enter_context(prefix.resume_from(states))
        contexts.enter_context(_record_factors(modules, trained, inputs, probes))
        outputs = task.outputs(batch).float()
        if not outputs.isfinite().all():
            raise NonFiniteError(
                f"the trained model's answer to the edit is not finite{explain_non_finite(task.model)}"
            )
        # Not distribution.loss, whose gradient for softmax outputs is precomputed and has no second derivative.
        losses = row_mean(-task.distribution.log_prob(outputs, batch.target), batch.row, batch.rows)
        all_probes = [probe for of_module in probes.values() for probe in of_module]
        gradients = iter(torch.autograd.grad(losses.sum(), all_probes, create_graph=training))

    def by_episode(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.float().reshape(batch.rows, -1, part.shape[-1]) for part in parts], 1)

    deltas = {
        name: by_episode([output_rows(modules[name], next(gradients)) for _ in of_module])
        for name, of_module in probes.items()
    }
    return {name: by_episode(of_module) for name, of_module in inputs.items()}, deltas


@contextmanager
def _record_factors(
    modules: Mapping[str, nn.Module],
    trained: Mapping[str, LowRank],
    inputs: Mapping[str, list[Tensor]],
    probes: Mapping[str, list[Tensor]],
) -> Iterator[None]:
    """Let each module act as trained; collect its inputs, and zeros added to its outputs whose gradients are δ."""

    def hook(name: str) -> Any:
        branch = LowRankHook(trained[name])

        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            inputs[name].append(layer_inputs(module, args, kwargs)[0])
            probe = torch.zeros_like(output, requires_grad=True)
            probes[name].append(probe)
            return branch(module, args, kwargs, output) + probe

        return run

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        remove_hooks(handles)
