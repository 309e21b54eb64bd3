"""The kinds of layer whose weight can be edited, and how each lays its weight out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from remend.core.low_rank import LowRank
from remend.core.moe import ExpertLinear, expert_linears

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``, a linear layer whose weight is stored as [d_in, d_out].

    The class is told by its qualified name, so that the core needs torch only. The shape must not decide: a square
    ``Conv1D`` weight looks just like a ``Linear`` one.
    """
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_editable(module: nn.Module) -> bool:
    """Whether remend can capture factors at ``module`` and edit its weight."""
    return isinstance(module, nn.Linear | ExpertLinear) or is_conv1d(module)


def editable_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every layer of ``model`` that can be edited, with its name: experts under their parameter's."""
    for name, module in model.named_modules(prefix=prefix):
        if is_editable(module):
            yield name, module
        for key, linear in expert_linears(module).items():
            yield f"{name}.{key}" if name else key, linear


def weight_of(module: nn.Module) -> Tensor:
    """The weight parameter, in the layer's own layout: [d_out, d_in] for ``Linear``, [d_in, d_out] for ``Conv1D``.

    Of experts [expert, d_out, d_in] or, if so stored, [expert, d_in, d_out].
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def dimensions(module: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)`` of an editable layer, also where its weight is packed and has another shape."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = weight_of(module).shape[-2:]
    return (columns, rows) if isinstance(module, ExpertLinear) and not module.transposed else (rows, columns)


def expert_count(module: nn.Module) -> int:
    """How many experts' matrices an editable layer holds; 0 where it is one of its own."""
    return module.num_experts if isinstance(module, ExpertLinear) else 0


def is_plain_float(weight: Tensor) -> bool:
    """Whether ``weight`` stores its values as floats. A quantised one may only claim to: a wrapper of other tensors."""
    return weight.dtype in _FLOATS and not hasattr(weight, "__tensor_flatten__")


def is_quantized(module: nn.Module) -> bool:
    """Whether an editable layer's weight is stored in fewer bits than it is computed with: never to be written to."""
    weight = weight_of(module)
    d_in, d_out = dimensions(module)
    return not is_plain_float(weight) or weight.numel() != d_in * d_out * (expert_count(module) or 1)


def weight_rms(module: nn.Module) -> float:
    """The root mean square of a weight's entries.

    Of one that is packed, or offloaded and so not at hand, about that of a freshly made layer's.
    """
    weight = weight_of(module)
    if is_quantized(module) or weight.is_meta:
        return float(dimensions(module)[0] ** -0.5)
    return float(weight.detach().float().square().mean().sqrt())


def parameter_owner(module: nn.Module) -> nn.Module:
    """The module of the model that holds a layer's parameters: itself, but for experts."""
    holder: nn.Module = module.owner if isinstance(module, ExpertLinear) else module
    return holder


def execution_device(module: nn.Module) -> torch.device:
    """Where ``module`` takes its input: the device of its first parameter.

    A parameter that Accelerate offloads is on ``meta`` between calls; then it is where Accelerate brings it for a call.
    """
    owner, parameter = next(
        (part, own) for part in parameter_owner(module).modules() for own in part.parameters(recurse=False)
    )
    hook: Any = getattr(owner, "_hf_hook", None)
    return torch.device(hook.execution_device) if parameter.is_meta and hook is not None else parameter.device


def dense_in_weight_layout(module: nn.Module, change: LowRank) -> Float[Tensor, "*expert rows columns"]:
    """``change`` as a dense matrix in the layout of ``module``'s own weight: to merge, never to train or apply."""
    dense = change.dense(expert_count(module))
    return dense.mT if is_conv1d(module) or (isinstance(module, ExpertLinear) and module.transposed) else dense


def layer_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Int[Tensor, " row"] | None]:
    """What a layer was called with, by position or by keyword: its input, and of experts whom each row is for."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    floats = [value for value in tensors if value.is_floating_point()]
    assert len(floats) == 1, "a linear layer takes exactly one tensor"
    assert len(tensors) <= 2, "experts are also told who they are"
    return floats[0], next((value for value in tensors if value is not floats[0]), None)
