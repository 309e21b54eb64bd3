"""Gradient factors: what one forward and one partial backward pass say about each edited weight.

For a linear layer y = W x and a loss l, the gradient of a batch of token rows is ∇W = Σ_j δ_j u_jᵀ with u_j the layer's
input at token j and δ_j = ∂l/∂y_j (paper, section 3.1 and appendix D). Only u and δ are kept; ∇W is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from remend.core.hooks import frozen, remove_hooks
from remend.core.layers import is_plain_float, layer_inputs, output_rows
from remend.core.low_rank import LowRank
from remend.errors import ModelError, NonFiniteError


@dataclass(frozen=True, eq=False)
class GradientFactors:
    """The factors of one layer's gradient, for each episode of a batch apart.

    Attributes:
        u: the layer's input at every token.
        delta: the loss's gradient with respect to the layer's output; zero at tokens that do not count.
        active: the tokens that carry gradient: unmasked, and delta not zero. Only these are transformed.
        experts: of a layer of experts, to whom each row goes; a token then has a row for each of its experts.
    """

    u: Float[Tensor, "episode token d_in"]
    delta: Float[Tensor, "episode token d_out"]
    active: Bool[Tensor, "episode token"]
    experts: Int[Tensor, "episode token"] | None = None

    def gradient(self, experts: int = 0) -> Float[Tensor, "episode *expert d_out d_in"]:
        """∇W, dense, for each episode (of ``experts`` experts). The size of the weight: for tests."""
        return LowRank(self.u, self.delta, experts=self.experts).dense(experts)


class _Recorder:
    """A forward hook that keeps a layer's inputs, and a zero added to its output whose gradient is δ.

    The added zero (the *probe*) is what asks for a gradient first, so the backward pass ends at the lowest recorded
    layer. It also survives what happens to the output later: a retained output would be spoilt by an in-place
    activation. Every call of the layer is recorded, until the forward pass is declared over: activation checkpointing
    calls it again during the backward pass, for values only.
    """

    def __init__(self, module: nn.Module, tokens: Bool[Tensor, "episode token"]) -> None:
        self.module = module
        self.tokens = tokens
        self.inputs: list[Tensor] = []
        self.probes: list[Tensor] = []
        self.experts: list[Tensor] = []
        self.closed = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        if self.closed:  # recomputed: the same operations again, so that checkpointing finds what it saved
            return output + probe
        # A copy: a frozen layer's backward pass does not need its input, and autograd would not see it overwritten.
        x, experts = layer_inputs(module, args, kwargs)
        self.inputs.append(x.detach().to(output.device, copy=True))
        if experts is not None:
            self.experts.append(experts.to(output.device, copy=True))
        self.probes.append(probe)
        return output + probe

    def factors(self, gradients: list[Tensor | None]) -> GradientFactors:
        """The calls' factors side by side along the token axis, as float32."""
        episodes, length = self.tokens.shape
        inputs, deltas, masks = [], [], []
        for x, probe, gradient in zip(self.inputs, self.probes, gradients, strict=True):
            rows = x[..., 0].numel()
            if x.shape[0] != episodes and (rows % (episodes * length) if self.experts else rows != episodes * length):
                raise ModelError(
                    f"a module to edit is called with an input of shape {tuple(x.shape)}, which cannot be divided "
                    f"among {episodes} episodes of {length} tokens; choose other modules"
                )
            delta = output_rows(self.module, torch.zeros_like(probe) if gradient is None else gradient)
            u = x.reshape(episodes, -1, x.shape[-1]).float()
            delta = delta.reshape(episodes, -1, delta.shape[-1]).float()
            mask = self.tokens.to(u.device)
            if self.experts:  # as many rows of a token as it has experts
                mask = mask.repeat_interleave(u.shape[1] // length, 1)
            if u.shape[1] != mask.shape[1]:  # another sequence than the batch's own (a layer over an encoder's output)
                mask = mask.new_ones(u.shape[:2])
            # masked_fill, not a product: what stands at a padded position may be NaN, and NaN · 0 is NaN.
            delta = delta.masked_fill(~mask[..., None], 0)
            inputs.append(u.masked_fill(~mask[..., None], 0))
            deltas.append(delta)
            masks.append(mask & (delta != 0).any(-1))
        experts = torch.cat([own.view(episodes, -1) for own in self.experts], 1) if self.experts else None
        return GradientFactors(torch.cat(inputs, 1), torch.cat(deltas, 1), torch.cat(masks, 1), experts)


def capture_gradient_factors(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tokens: Mapping[str, Bool[Tensor, "episode token"]],
    loss: Callable[[], Float[Tensor, " episode"]],
) -> tuple[Float[Tensor, " episode"], dict[str, GradientFactors]]:
    """Run ``loss`` once and return it with the gradient factors of every module in ``modules``.

    The episodes are independent: the loss is one number an episode, and their sum is differentiated, so that each
    episode's factors are those of its own loss. ``model`` is left as it was: weights, modes, no ``.grad``, no hook.

    Args:
        model: the model that ``loss`` runs; frozen meanwhile.
        modules: the layers to record, by name.
        tokens: for each layer which tokens count; padding takes no part.
        loss: runs the model on the batch and returns l_e for each episode.

    Raises:
        ModelError: a module was not called in the forward pass.
        NonFiniteError: a loss, an input or a delta is NaN or infinite; the message names the module and the episodes.
    """
    recorders = {name: _Recorder(modules[name], tokens[name]) for name in modules}
    handles = [modules[name].register_forward_hook(recorder, with_kwargs=True) for name, recorder in recorders.items()]
    try:
        with frozen(model), torch.enable_grad():
            losses = loss()
            for name, recorder in recorders.items():
                recorder.closed = True
                if not recorder.probes:
                    raise ModelError(f"{name} was not called by the model's forward pass; choose other modules to edit")
            probes = [probe for recorder in recorders.values() for probe in recorder.probes]
            if not losses.isfinite().all():
                raise NonFiniteError(_where("the loss of the edit", losses) + explain_non_finite(model))
            gradients = iter(torch.autograd.grad(losses.sum(), probes, allow_unused=True))
    finally:
        remove_hooks(handles)
    factors = {name: r.factors([next(gradients) for _ in r.probes]) for name, r in recorders.items()}
    _refuse_non_finite(factors)
    return losses.detach(), factors


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What a layer is called with in one pass, as float32.

    Some models flatten rows and tokens into one axis before their MLPs; here they are apart again.

    Attributes:
        x: the input; of experts a token's rows follow each other, one for each expert it goes to.
        experts: of experts, to whom each goes.
    """

    x: Float[Tensor, "row token d"]
    experts: Int[Tensor, "row token"] | None = None

    def at_tokens(self, tokens: Int[Tensor, " row"], length: int) -> tuple[Tensor, Int[Tensor, "row slot"]]:
        """The inputs [row, slot, d] at one token of each row, of ``length`` tokens, and to whom they go (0: to all)."""
        rows, places, d = self.x.shape
        slots, row = places // length, torch.arange(rows, device=self.x.device)
        whose = self.x.new_zeros(rows, places, dtype=torch.long) if self.experts is None else self.experts
        where = tokens.to(self.x.device)
        return self.x.view(rows, length, slots, d)[row, where], whose.view(rows, length, slots)[row, where]


@torch.no_grad()
def record_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], rows: int, forward: Callable[[], object]
) -> dict[str, LayerInput]:
    """What each module is called with when ``forward`` runs on ``rows`` rows; no gradient is taken.

    Raises:
        ModelError: a module was not called.
    """
    found: dict[str, LayerInput] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def kept(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, experts = layer_inputs(module, args, kwargs)
            x = x.detach().float().reshape(rows, -1, x.shape[-1])
            found[name] = LayerInput(x, None if experts is None else experts.reshape(rows, -1))

        return kept

    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with frozen(model):
            forward()
    finally:
        remove_hooks(handles)
    if missed := modules.keys() - found.keys():
        raise ModelError(f"{min(missed)} was not called by the model's forward pass; choose other modules to edit")
    return found


def _refuse_non_finite(factors: Mapping[str, GradientFactors]) -> None:
    """Raise with the first module whose factors hold NaN or infinity; one look at the device where all is well."""
    sums = torch.stack([(f.u.sum() + f.delta.sum()).cpu() for f in factors.values()])
    if sums.isfinite().all():
        return
    for name, factor in factors.items():
        for what, values in ((f"the input of {name}", factor.u), (f"the gradient at {name}", factor.delta)):
            if not values.isfinite().all():
                raise NonFiniteError(_where(what, values))


def explain_non_finite(model: nn.Module) -> str:
    """Names the first parameter that holds NaN or infinity, if one does."""
    for name, parameter in model.named_parameters():
        if is_plain_float(parameter) and not parameter.is_meta and not parameter.isfinite().all():
            return f"; the model's own weight {name} holds NaN or infinity: load it anew, or repair the checkpoint"
    return "; its weights are finite: try a wider dtype (float32 or bfloat16)"


def _where(what: str, values: Tensor) -> str:
    """Which episodes of a batch hold something that is not finite."""
    bad = (~values.isfinite()).reshape(values.shape[0], -1).any(1)
    rows = ", ".join(str(i) for i in bad.nonzero().flatten().tolist()[:8])
    return f"{what} is not finite (episodes {rows} of the batch)"
