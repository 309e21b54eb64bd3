"""Editable Neural Networks: the model itself is trained to be easy to edit (Sinitsin et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from remend.config import Config
from remend.core.capture import explain_non_finite
from remend.core.hooks import LowRankHook, frozen, remove_hooks
from remend.core.layers import is_quantized, layer_inputs, output_rows, weight_rms
from remend.core.losses import row_mean
from remend.core.low_rank import LowRank
from remend.editors.info import EditorInfo
from remend.editors.trainable import TrainableEditor
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
        step: the gradient step that every matrix starts with; 1 changes a token's output by about its own size.
    """

    step: PositiveFloat = 0.5


class Enn(TrainableEditor):
    """An editable neural network: the edited matrices are trained so that one gradient step edits well.

    An edit is what training changed (a whole matrix each, the same for all edits) and one step of gradient descent on
    the pair in the trained model, with a learned step size for each matrix. Since the step must be differentiated with
    respect to the weights at which it is taken, training needs second derivatives. They are taken through the factors
    of the step, u and δ as functions of the weights, so that a batch of episodes trains in one pass as MEND's does, for
    one copy of the edited matrices in each. (In the original all weights are trained; here the edited ones.)
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "enn", "Sinitsin et al., ICLR 2020 (arXiv 2004.00345)", "training", "dense", sequences=False
    )
    config_class: ClassVar[type[Config]] = EnnConfig
    size: Tensor

    def __init__(self, config: EnnConfig, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(config, base, shapes)
        self.alpha = nn.Parameter(torch.full((len(self.shapes),), config.step).log())
        self.networks = nn.ParameterList(torch.zeros(min(s), max(s)) for s in self.shapes.values())
        self.register_buffer("size", torch.ones(len(self.shapes)))

    def build(self, task: Task) -> None:
        """Weights are trained in units of their own size, so that one learning rate suits any model."""
        for place, (name, module) in enumerate(find_modules(task.model, self.shapes).items()):
            if is_quantized(module):
                raise ConfigError(f"{name} is quantised, and an ENN trains the weights themselves: use another editor")
            self.size[place] = weight_rms(module)

    def manifest_fields(self) -> dict[str, Any]:
        """Return the settings, and that each edit holds what training changed, so that edits cannot be added."""
        return {**super().manifest_fields(), "shared": True}

    def shared(self, name: str) -> int:
        """As many as a matrix of full rank has."""
        return min(self.shapes[name])

    def _trained(self) -> dict[str, LowRank]:
        """What training changed, with the identity as one factor."""
        found = {}
        for place, (name, (d_in, d_out)) in enumerate(self.shapes.items()):
            values = self.networks[place] * self.size[place]
            identity = torch.eye(min(d_in, d_out), device=values.device)
            found[name] = LowRank(values, identity) if d_in > d_out else LowRank(identity, values)
        return found

    def episode_changes(
        self, task: Task, pairs: Sequence[Example], prefix: FrozenPrefix, states: Tensor | None
    ) -> dict[str, LowRank]:
        """What training changed, and a step on each pair from there."""
        trained, batch = self._trained(), task.collate(pairs)
        u, delta = _gradient(task, batch, trained, prefix, states)
        found = {}
        for place, (name, common) in enumerate(trained.items()):
            every, step = (len(pairs), -1, -1), self.alpha[place].exp() * self.unit[place]
            own, moved = u[name].to(self.device), delta[name].to(self.device)
            found[name] = LowRank(
                torch.cat([common.u.expand(every), own], 1),
                torch.cat([common.delta.expand(every), -step * moved], 1),
            )
        return found


def _gradient(
    task: Task, batch: Batch, trained: Mapping[str, LowRank], prefix: FrozenPrefix, states: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """U and δ of every token of each pair in the trained model, as functions of what was trained."""
    modules, learning = find_modules(task.model, trained), torch.is_grad_enabled()
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    probes: dict[str, list[Tensor]] = {name: [] for name in modules}
    with ExitStack() as within:
        within.enter_context(frozen(task.model))
        within.enter_context(torch.enable_grad())
        within.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others have no second derivative
        within.enter_context(prefix.resume_from(states))
        within.enter_context(_recorded(modules, trained, inputs, probes))
        logits = task.outputs(batch).float()
        if not logits.isfinite().all():
            raise NonFiniteError(
                f"the trained model's answer to the edit is not finite{explain_non_finite(task.model)}"
            )
        losses = row_mean(cross_entropy(logits, batch.target, reduction="none"), batch.row, batch.rows)
        every = [probe for own in probes.values() for probe in own]
        found = iter(torch.autograd.grad(losses.sum(), every, create_graph=learning))

    def by_episode(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.float().reshape(batch.rows, -1, part.shape[-1]) for part in parts], 1)

    deltas = {name: by_episode([output_rows(modules[name], next(found)) for _ in own]) for name, own in probes.items()}
    return {name: by_episode(own) for name, own in inputs.items()}, deltas


@contextmanager
def _recorded(
    modules: Mapping[str, nn.Module],
    trained: Mapping[str, LowRank],
    inputs: Mapping[str, list[Tensor]],
    probes: Mapping[str, list[Tensor]],
) -> Iterator[None]:
    """Within it, each module acts as trained; what it reads is kept, and a zero at its output that asks for δ."""

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
