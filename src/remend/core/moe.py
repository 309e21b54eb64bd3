"""Mixture-of-experts matrices that a model keeps in one tensor, as layers that can be recorded and edited.

In a mixture of experts each token goes through a few of many MLPs. transformers stores the matrices of all experts as
one parameter [expert, d_out, d_in] and multiplies with it directly, so there is no layer to hook. :class:`ExpertLinear`
stands for such a parameter. It is called with one row for each token and each expert that the token is routed to, and
with the experts' indices. The gradient factors of an expert are the rows routed to it. A change of the parameter is one
list of factor pairs; each pair belongs to one expert and acts on that expert's rows only.

While an :class:`ExpertLinear` is hooked, the experts module computes its output through it. Without hooks the module
runs its usual forward pass.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remend.errors import ModelError

DOWN_PROJECTION = "down_proj"
"""The matrices that write to the residual stream, in transformers' interface for experts."""

_GATED_UP_PROJECTION, _UP_PROJECTION = "gate_up_proj", "up_proj"


class ExpertLinear(nn.Module):
    """One parameter that holds a matrix of every expert of a module, as a layer. The weight stays with its owner.

    Attributes:
        owner: the module that holds the parameter.
        parameter_name: the parameter's name in the owner.
    """

    parameter_name: str

    def __init__(self, owner: nn.Module, parameter_name: str) -> None:
        super().__init__()
        self.parameter_name = parameter_name
        self._bind(owner)

    def _bind(self, owner: nn.Module) -> None:
        # Weak: `_layers` holds this object for as long as its owner lives, and a strong reference would keep both.
        self._owner = weakref.ref(owner)

    @property
    def owner(self) -> Any:
        """The module that holds the parameter.

        Raises:
            ModelError: the model no longer exists.
        """
        reference = self.__dict__.get("_owner")  # absent in a copy of this object without its model
        owner = None if reference is None else reference()
        if owner is None:
            raise ModelError(
                f"the model that {self.parameter_name} belongs to no longer exists; keep a reference to it"
            )
        return owner

    @property
    def weight(self) -> Float[Tensor, "expert rows columns"]:
        """The parameter itself, in its owner's layout."""
        weight: Tensor = getattr(self.owner, self.parameter_name)
        return weight

    @property
    def transposed(self) -> bool:
        """Whether each expert's matrix is stored as [d_in, d_out]."""
        return bool(self.owner.is_transposed)

    @property
    def num_experts(self) -> int:
        """The number of experts."""
        return self.weight.shape[0]

    def forward(self, x: Float[Tensor, "row d_in"], experts: Int[Tensor, " row"]) -> Float[Tensor, "row d_out"]:
        """Multiply each row with the matrix of its expert."""
        # Sorted by expert, so that each expert's matrix is multiplied once. Stably, so that the order of an expert's
        # rows, and with it the rounding, is always the same.
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=self.num_experts).tolist()
        bias = getattr(self.owner, f"{self.parameter_name}_bias") if self.owner.has_bias else None
        outputs = []
        for expert, rows in enumerate(x[order].split(counts)):
            if len(rows):
                weight = self.weight[expert].mT if self.transposed else self.weight[expert]
                outputs.append(nn.functional.linear(rows, weight, None if bias is None else bias[expert]))
        return torch.cat(outputs)[order.argsort()]

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook; until its handle is removed, the owner computes through its :class:`ExpertLinear` s."""
        return _Handle(super().register_forward_hook(*args, **kwargs), self.owner)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Register a hook, with the same effect on the owner as :meth:`register_forward_hook`."""
        return _Handle(super().register_forward_pre_hook(*args, **kwargs), self.owner)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the owner out: a copy belongs to the copied owner, which :class:`_HookedForward` binds it to."""
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}


_layers: weakref.WeakKeyDictionary[nn.Module, dict[str, ExpertLinear]] = weakref.WeakKeyDictionary()
"""The layers of each experts module that was looked at. Here, not on the module, which is the user's."""


class _Handle(RemovableHandle):
    """Removes a hook and, with the last one, restores the owner's usual forward pass."""

    def __init__(self, hook: RemovableHandle, owner: nn.Module) -> None:
        self.hook, self.owner = hook, owner
        _replace_forward_if_hooked(owner)

    def remove(self) -> None:
        self.hook.remove()
        _replace_forward_if_hooked(self.owner)


def expert_linears(module: nn.Module) -> dict[str, ExpertLinear]:
    """Return the layers of a module that holds the matrices of several experts, by parameter name.

    The same objects are returned at each call. For any other module the result is empty. Experts modules are recognized
    by the attributes that transformers' interface for experts gives them.
    """
    if not all(hasattr(module, name) for name in ("is_transposed", "has_bias", "has_gate", "_apply_gate", "config")):
        return {}
    layers = _layers.get(module)
    if layers is None:
        names = (_up_projection(module), DOWN_PROJECTION)
        layers = {
            name: ExpertLinear(module, name) for name in names if getattr(module, name, torch.empty(0)).dim() == 3
        }
        _layers[module] = layers = layers if len(layers) == len(names) else {}
    return layers


def _up_projection(owner: Any) -> str:
    return _GATED_UP_PROJECTION if owner.has_gate else _UP_PROJECTION


class _HookedForward:
    """A forward pass of experts through their :class:`ExpertLinear` s. A class, so that it can be deep-copied.

    Attributes:
        replaced: what this object took the place of in the owner's dictionary, if anything.
    """

    def __init__(self, owner: Any, replaced: object) -> None:
        self.owner, self.replaced = owner, replaced

    def __call__(
        self, hidden: Float[Tensor, "token d"], chosen: Int[Tensor, "token slot"], weights: Float[Tensor, "token slot"]
    ) -> Float[Tensor, "token d"]:
        """Run a row for each token and slot, in that order, through both matrices and add up the slots by weight."""
        owner, layers = self.owner, expert_linears(self.owner)
        up, down = layers[_up_projection(owner)], layers[DOWN_PROJECTION]
        slots, experts = chosen.shape[-1], chosen.reshape(-1)
        activation = owner._apply_gate if owner.has_gate else owner.act_fn
        rows = down(activation(up(hidden.repeat_interleave(slots, 0), experts)), experts)
        if getattr(owner, "has_post_expert_norm", False):
            rows = owner.post_expert_norm(rows)
        output: Tensor = (rows * weights.reshape(-1, 1)).view(len(hidden), slots, -1).sum(1)
        return output.to(hidden.dtype)

    # The layers with their hooks travel with a copy of the model, so that a copy of an edited model is edited too.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layers": expert_linears(self.owner)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layers = state.pop("layers")
        self.__dict__.update(state)
        for layer in layers.values():
            layer._bind(self.owner)
        _layers[self.owner] = layers


def _replace_forward_if_hooked(owner: nn.Module) -> None:
    """Let ``owner`` compute through its :class:`ExpertLinear` s if one of them is hooked, and as usual if none is.

    The forward pass is replaced as an attribute of the object, never of its class.
    """
    # Accelerate replaces forward too, to bring offloaded weights, and calls what it keeps as _old_forward: our forward
    # pass has to run inside of that.
    name = "_old_forward" if "_old_forward" in owner.__dict__ else "forward"
    current = owner.__dict__.get(name)
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in expert_linears(owner).values())
    if hooked and not isinstance(current, _HookedForward):
        owner.__dict__[name] = _HookedForward(owner, current)
    elif not hooked and isinstance(current, _HookedForward):
        owner.__dict__.pop(name)
        if current.replaced is not None:
            owner.__dict__[name] = current.replaced
