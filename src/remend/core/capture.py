"""Gradient factors: the low-rank form of each edited weight's gradient, from one forward and one partial backward pass.

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

from remend.core.layers import is_plain_float, layer_inputs, output_rows
from remend.core.low_rank import LowRank
from remend.core.low_rank_hooks import frozen, remove_hooks
from remend.errors import ModelError, NonFiniteError


@dataclass(frozen=True, eq=False)
class GradientFactors:
    """The factors of one layer's gradient, separately for each episode of a batch.

    Attributes:
        u: the layer's input at every token.
        delta: the loss's gradient with respect to the layer's output; zero at tokens that are masked.
        active: the tokens that carry gradient: unmasked, and delta not zero. Editors transform only these.
        experts: for a layer of experts, the index of each row's expert; a token has one row for each of its experts.
    """

    u: Float[Tensor, "episode token d_in"]
    delta: Float[Tensor, "episode token d_out"]
    active: Bool[Tensor, "episode token"]
    experts: Int[Tensor, "episode token"] | None = None

    def gradient(self, experts: int = 0) -> Float[Tensor, "episode *expert d_out d_in"]:
        """Compute the dense ∇W of each episode (and of each of ``experts`` experts). As large as W: for tests."""
        return LowRank(self.u, self.delta, experts=self.experts).dense(experts)


class _Recorder:
    """A forward hook that records a layer's inputs and adds a zero to its output (the *probe*) whose gradient is δ."""

    def __init__(self, module: nn.Module, tokens: Bool[Tensor, "episode token"]) -> None:
        self.module = module
        self.tokens = tokens
        self.inputs: list[Tensor] = []
        self.probes: list[Tensor] = []
        self.experts: list[Tensor] = []
        self.closed = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        # A probe instead of retain_grad on the output: an in-place activation would overwrite a retained output, and
        # since nothing before the lowest probe requires a gradient, the backward pass ends there.
        probe = torch.zeros_like(output, requires_grad=True)
        # Activation checkpointing calls the layer again during the backward pass. It must see the same operations as
        # before to find the tensors it saved, but these calls are not recorded.
        if self.closed:
            return output + probe
        # A copy: a frozen layer's backward pass does not need its input, so autograd would not notice that the model
        # overwrites it in place.
        x, experts = layer_inputs(module, args, kwargs)
        self.inputs.append(x.detach().to(output.device, copy=True))
        if experts is not None:
            self.experts.append(experts.to(output.device, copy=True))
        self.probes.append(probe)
        return output + probe

    def factors(self, gradients: list[Tensor | None]) -> GradientFactors:
        """Join the factors of all calls along the token axis, as float32."""
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
            if self.experts:  # a token has a row for each of its experts
                mask = mask.repeat_interleave(u.shape[1] // length, 1)
            # A layer over another sequence than the batch's, such as an encoder's output or an image's patches: the
            # mask says nothing about its rows.
            if u.shape[1] != mask.shape[1]:
                mask = mask.new_ones(u.shape[:2])
            # masked_fill, not a product: the value at a padded position may be NaN, and NaN · 0 is NaN.
            delta = delta.masked_fill(~mask[..., None], 0)
            inputs.append(u.masked_fill(~mask[..., None], 0))
            deltas.append(delta)
            masks.append(mask & (delta != 0).any(-1))
        experts = torch.cat([call.view(episodes, -1) for call in self.experts], 1) if self.experts else None
        return GradientFactors(torch.cat(inputs, 1), torch.cat(deltas, 1), torch.cat(masks, 1), experts)


def capture_gradient_factors(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tokens: Mapping[str, Bool[Tensor, "episode token"]],
    loss: Callable[[], Float[Tensor, " episode"]],
) -> tuple[Float[Tensor, " episode"], dict[str, GradientFactors]]:
    """Run ``loss`` once and return it with the gradient factors of every module in ``modules``.

    The loss is one number for each episode, and the episodes are independent: each one's factors are those of its own
    loss. ``model`` is left as it was: weights, modes, no ``.grad``, no hook.

    Args:
        model: the model that ``loss`` runs; it is frozen meanwhile.
        modules: the layers to record, by name.
        tokens: for each layer the tokens that count; padding is left out.
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
                raise NonFiniteError(_non_finite_message("the loss of the edit", losses) + explain_non_finite(model))
            # One backward pass of the sum gives each episode's own gradient, since episodes share no row of a probe.
            gradients = iter(torch.autograd.grad(losses.sum(), probes, allow_unused=True))
    finally:
        remove_hooks(handles)
    factors = {name: r.factors([next(gradients) for _ in r.probes]) for name, r in recorders.items()}
    _raise_if_non_finite(factors)
    return losses.detach(), factors


@dataclass(frozen=True, eq=False)
class LayerInput:
    """A layer's input in one forward pass, as float32 and with separate axes for rows and tokens.

    Some models flatten rows and tokens into one axis before their MLPs; that is undone here.

    Attributes:
        x: the input; for a layer of experts a token's rows follow each other, one for each of its experts.
        experts: for a layer of experts, the index of each row's expert.
    """

    x: Float[Tensor, "row token d"]
    experts: Int[Tensor, "row token"] | None = None

    def at_tokens(
        self, tokens: Int[Tensor, " place"], length: int, row: Int[Tensor, " place"] | None = None
    ) -> tuple[Tensor, Int[Tensor, "place slot"]]:
        """Return the inputs [place, slot, d] at some tokens, and the index of each slot's expert.

        Args:
            tokens: each token's index in its row.
            length: the number of tokens in a row.
            row: each token's row; by default the rows in order, one token of each.

        Returns:
            The inputs, with one slot for each expert of a token (one slot for other layers), and the experts (0 for
            other layers).
        """
        rows, positions, d = self.x.shape
        slots = positions // length
        row = torch.arange(rows, device=self.x.device) if row is None else row.to(self.x.device)
        experts = self.x.new_zeros(rows, positions, dtype=torch.long) if self.experts is None else self.experts
        token = tokens.to(self.x.device)
        return self.x.view(rows, length, slots, d)[row, token], experts.view(rows, length, slots)[row, token]


@torch.no_grad()
def record_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], rows: int, forward: Callable[[], object]
) -> dict[str, LayerInput]:
    """Run ``forward`` on ``rows`` rows and return the input of each module; no gradient is taken.

    Raises:
        ModelError: a module was not called.
    """
    inputs: dict[str, LayerInput] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, experts = layer_inputs(module, args, kwargs)
            x = x.detach().float().reshape(rows, -1, x.shape[-1])
            inputs[name] = LayerInput(x, None if experts is None else experts.reshape(rows, -1))

        return record

    handles = [module.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with frozen(model):
            forward()
    finally:
        remove_hooks(handles)
    if missed := modules.keys() - inputs.keys():
        raise ModelError(f"{min(missed)} was not called by the model's forward pass; choose other modules to edit")
    return inputs


def _raise_if_non_finite(factors: Mapping[str, GradientFactors]) -> None:
    """Raise with the first module whose factors hold NaN or infinity."""
    # One sum for all modules, so that the usual case waits for the device once.
    sums = torch.stack([(f.u.sum() + f.delta.sum()).cpu() for f in factors.values()])
    if sums.isfinite().all():
        return
    for name, factor in factors.items():
        for what, values in ((f"the input of {name}", factor.u), (f"the gradient at {name}", factor.delta)):
            if not values.isfinite().all():
                raise NonFiniteError(_non_finite_message(what, values))


def explain_non_finite(model: nn.Module) -> str:
    """Return the end of an error message: the first parameter that is not finite, or what to try if all are."""
    for name, parameter in model.named_parameters():
        if is_plain_float(parameter) and not parameter.is_meta and not parameter.isfinite().all():
            return f"; the model's own weight {name} holds NaN or infinity: load it anew, or repair the checkpoint"
    return "; its weights are finite: try a wider dtype (float32 or bfloat16)"


def _non_finite_message(what: str, values: Tensor) -> str:
    """Say that a tensor with an episode axis is not finite, and in which episodes."""
    bad = (~values.isfinite()).reshape(values.shape[0], -1).any(1)
    rows = ", ".join(str(i) for i in bad.nonzero().flatten().tolist()[:8])
    return f"{what} is not finite (episodes {rows} of the batch)"
