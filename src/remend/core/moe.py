"""Experts that a layer keeps in one tensor: their matrices as a layer that can be captured at and edited.

In a mixture of experts each token goes through a few of many MLPs, and transformers stores the matrices of all of them
as one parameter [expert, d_out, d_in], with a forward pass that calls no layer to hook. Here such a parameter is an
:class:`ExpertLinear`: called with one row for each token and each expert that it is routed to, and with who those
experts are. An expert's gradient factors are the rows routed to it, and a change of the parameter is one list of factor
pairs, each of which belongs to an expert and acts on that expert's rows alone.

While such a layer is hooked, the experts compute their output through it; without hooks they run as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

DOWN_PROJECTION = "down_proj"
"""The matrices that write to the residual stream, in transformers' interface for experts."""

_INPUTS = ("gate_up_proj", "up_proj")
_HOLDER = "_expert_linears"


class ExpertLinear(nn.Module):
    """One matrix of all experts of a layer: a view, whose weight stays where it is.

    Attributes:
        owner: the module that holds the parameter.
        parameter_name: the parameter's name there.
    """

    owner: Any
    parameter_name: str

    def __init__(self, owner: nn.Module, parameter_name: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not as a submodule: it is the other way round
        self.parameter_name = parameter_name

    @property
    def weight(self) -> Float[Tensor, "expert rows columns"]:
        """The parameter itself, as its owner lays it out."""
        weight: Tensor = getattr(self.owner, self.parameter_name)
        return weight

    @property
    def transposed(self) -> bool:
        """Whether each expert's matrix is stored as [d_in, d_out]."""
        return bool(self.owner.is_transposed)

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return self.weight.shape[0]

    def forward(self, x: Float[Tensor, "row d_in"], experts: Int[Tensor, " row"]) -> Float[Tensor, "row d_out"]:
        """Each row times the matrix of its own expert."""
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=self.num_experts).tolist()
        bias = getattr(self.owner, f"{self.parameter_name}_bias") if self.owner.has_bias else None
        parts = []
        for expert, rows in enumerate(x[order].split(counts)):
            if len(rows):
                weight = self.weight[expert].mT if self.transposed else self.weight[expert]
                parts.append(nn.functional.linear(rows, weight, None if bias is None else bias[expert]))
        return torch.cat(parts)[order.argsort()]

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As every module's; until the handle is removed, the owner computes through its :class:`ExpertLinear` s."""
        return _Handle(super().register_forward_hook(*args, **kwargs), self.owner)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As :meth:`register_forward_hook`."""
        return _Handle(super().register_forward_pre_hook(*args, **kwargs), self.owner)


class _Handle(RemovableHandle):
    """Takes a hook off, and with the last one leaves the owner's forward pass as it was."""

    def __init__(self, plain: RemovableHandle, owner: nn.Module) -> None:
        self.plain, self.owner = plain, owner
        _route(owner)

    def remove(self) -> None:
        self.plain.remove()
        _route(self.owner)


def expert_linears(module: nn.Module) -> dict[str, ExpertLinear]:
    """The matrices of a module that holds those of several experts, by parameter; empty for any other module.

    Such modules are told by the attributes that transformers' interface for experts gives them.
    """
    if not all(hasattr(module, name) for name in ("is_transposed", "has_bias", "has_gate", "_apply_gate", "config")):
        return {}
    views: dict[str, ExpertLinear] | None = module.__dict__.get(_HOLDER)
    if views is None:
        keys = (_INPUTS[0] if module.has_gate else _INPUTS[1], DOWN_PROJECTION)
        views = {key: ExpertLinear(module, key) for key in keys if getattr(module, key, torch.empty(0)).dim() == 3}
        views = views if len(views) == len(keys) else {}
        module.__dict__[_HOLDER] = views
    return views


class _Routed:
    """Another forward pass of experts, through their :class:`ExpertLinear` s; a class, so that it can be deep-copied.

    Attributes:
        plain: what stood in its place in the owner's dictionary, if anything.
    """

    def __init__(self, owner: Any, plain: object) -> None:
        self.owner, self.plain = owner, plain

    def __call__(
        self, hidden: Float[Tensor, "token d"], chosen: Int[Tensor, "token slot"], weights: Float[Tensor, "token slot"]
    ) -> Float[Tensor, "token d"]:
        """A row for each token and slot, in that order, through both matrices; the slots are added up by weight."""
        owner, views = self.owner, expert_linears(self.owner)
        enter, leave = views[_INPUTS[0] if owner.has_gate else _INPUTS[1]], views[DOWN_PROJECTION]
        slots, experts = chosen.shape[-1], chosen.reshape(-1)
        activation = owner._apply_gate if owner.has_gate else owner.act_fn
        rows = leave(activation(enter(hidden.repeat_interleave(slots, 0), experts)), experts)
        if getattr(owner, "has_post_expert_norm", False):
            rows = owner.post_expert_norm(rows)
        found: Tensor = (rows * weights.reshape(-1, 1)).view(len(hidden), slots, -1).sum(1)
        return found.to(hidden.dtype)


def _route(owner: nn.Module) -> None:
    """Let ``owner`` compute through its :class:`ExpertLinear` s if one of them is hooked, else as ever.

    As an attribute of the object, never of its class; where Accelerate has put one that moves weights to where they are
    needed, in the place of what that calls.
    """
    place = "_old_forward" if "_old_forward" in owner.__dict__ else "forward"
    present = owner.__dict__.get(place)
    hooked = any(view._forward_hooks or view._forward_pre_hooks for view in expert_linears(owner).values())
    if hooked and not isinstance(present, _Routed):
        owner.__dict__[place] = _Routed(owner, present)
    elif not hooked and isinstance(present, _Routed):
        owner.__dict__.pop(place)
        if present.plain is not None:
            owner.__dict__[place] = present.plain
