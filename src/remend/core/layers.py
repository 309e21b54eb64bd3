"""The kinds of layer whose weight can be edited: their dimensions, their weight's layout, their inputs as rows.

Every editable layer computes y = W x + b for each row x of its input. This module hides how each kind stores W and
where the rows are in its input and output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from remend.core.low_rank import LowRank
from remend.core.moe import ExpertLinear, expert_linears
from remend.errors import EditError

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def is_conv1d(module: nn.Module) -> bool:
    """Return whether ``module`` is transformers' ``Conv1D``: a linear layer with its weight stored as [d_in, d_out]."""
    # By qualified name, since the core imports torch only. Not by shape: a square weight looks like that of a Linear.
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_matrix_convolution(module: nn.Module) -> bool:
    """Return whether ``module`` is a ``Conv2d`` that multiplies disjoint patches with a matrix [c_out, c_in·k·k].

    That is so for a 1×1 kernel and for a kernel that equals the stride (patch embeddings), without padding, dilation
    and groups.
    """
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.dilation != (1, 1):
        return False
    # Subclasses that normalize the weight or pad by themselves compute something else than W x.
    if type(module).forward is not nn.Conv2d.forward or type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return False
    unpadded = module.padding in ((0, 0), "valid") or (module.padding == "same" and module.kernel_size == (1, 1))
    return unpadded and module.kernel_size in ((1, 1), module.stride)


def is_editable(module: nn.Module) -> bool:
    """Return whether gradient factors can be captured at ``module`` and its weight can be edited."""
    return isinstance(module, nn.Linear | ExpertLinear) or is_conv1d(module) or is_matrix_convolution(module)


def describe_layer(module: nn.Module) -> str:
    """Describe the kind of a layer for a message: its class, and what decides whether a convolution can be edited."""
    if not isinstance(module, nn.Conv2d):
        return type(module).__name__
    size = "x".join(map(str, module.kernel_size))
    defaults = {"stride": None, "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    settings = {name: getattr(module, name) for name in defaults if getattr(module, name) != defaults[name]}
    equal = {name: value[0] for name, value in settings.items() if isinstance(value, tuple) and len(set(value)) == 1}
    return f"{type(module).__name__} {size}, " + ", ".join(f"{name} {v}" for name, v in {**settings, **equal}.items())


def editable_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every layer of ``model`` that can be edited with its name; experts have the name of their parameter."""
    for name, module in model.named_modules(prefix=prefix):
        if is_editable(module):
            yield name, module
        for key, linear in expert_linears(module).items():
            yield f"{name}.{key}" if name else key, linear


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight parameter in the layer's layout.

    [d_out, d_in] for ``Linear``, [d_in, d_out] for ``Conv1D``, [c_out, c_in, k, k] for ``Conv2d``, and for experts
    [expert, d_out, d_in] or [expert, d_in, d_out].
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def dimensions(module: nn.Module) -> tuple[int, int]:
    """Return ``(d_in, d_out)`` of an editable layer, also where its weight is quantized and stored in another shape."""
    # Not from the weight's shape: a quantized weight is packed, often into one column.
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.weight[0].numel(), module.out_channels
    rows, columns = weight_of(module).shape[-2:]
    return (columns, rows) if isinstance(module, ExpertLinear) and not module.transposed else (rows, columns)


def expert_count(module: nn.Module) -> int:
    """Return how many experts' matrices an editable layer holds; 0 where it is not a layer of experts."""
    return module.num_experts if isinstance(module, ExpertLinear) else 0


def is_plain_float(weight: Tensor) -> bool:
    """Return whether ``weight`` stores its values as floats, that is, whether it is not quantized."""
    # A quantized weight may report a float dtype: it is then a wrapper of other tensors.
    return weight.dtype in _FLOATS and not hasattr(weight, "__tensor_flatten__")


def is_quantized(module: nn.Module) -> bool:
    """Return whether an editable layer's weight is stored in fewer bits than it computes with.

    Such a weight must not be written to.
    """
    weight = weight_of(module)
    d_in, d_out = dimensions(module)
    return not is_plain_float(weight) or weight.numel() != d_in * d_out * (expert_count(module) or 1)


def shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """Return the editable layers whose weight is also a parameter of other modules, with these parameters' names.

    A side branch acts on one use of such a weight, and what is written into it on all of them: the output layer of many
    models is also their embedding.
    """
    users: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(name, recurse=False):
            users.setdefault(_memory_of(parameter), []).append(key)
    shared: dict[str, list[str]] = {}
    for name, layer in editable_layers(model):
        own = name if isinstance(layer, ExpertLinear) else f"{name}.weight".removeprefix(".")
        if others := [key for key in users.get(_memory_of(weight_of(layer)), []) if key != own]:
            shared[name] = others
    return shared


def _memory_of(parameter: Tensor) -> object:
    """Return what two parameters have in common if they are the same numbers in memory."""
    # Two parameters may be views of one tensor. One without values, or that wraps other tensors, has no address.
    if parameter.is_meta or hasattr(parameter, "__tensor_flatten__") or not parameter.data_ptr():
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def raise_if_shared(model: nn.Module, names: Iterable[str], consequence: str) -> None:
    """Raise :class:`EditError` if one of the named layers shares its weight (:func:`shared_weights`).

    Args:
        model: the model.
        names: the layers.
        consequence: what would go wrong, and what to do, for the message.
    """
    shared = shared_weights(model)
    if found := [name for name in names if name in shared]:
        raise EditError(f"the weight of {found[0]} is also {', '.join(shared[found[0]][:3])}: {consequence}")


def weight_rms(module: nn.Module) -> float:
    """Return the root mean square of a weight's entries.

    For a weight that is quantized or offloaded, this is about that of a newly initialized layer.
    """
    weight = weight_of(module)
    if is_quantized(module) or weight.is_meta:
        return float(dimensions(module)[0] ** -0.5)
    return float(weight.detach().float().square().mean().sqrt())


def parameter_owner(module: nn.Module) -> nn.Module:
    """Return the module of the model that holds a layer's parameters: ``module`` itself unless it holds experts."""
    owner: nn.Module = module.owner if isinstance(module, ExpertLinear) else module
    return owner


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which ``module`` takes its input: that of its first parameter.

    For a parameter that Accelerate offloads, it is the device to which Accelerate brings it for a call.
    """
    owner, parameter = next(
        (part, parameter) for part in parameter_owner(module).modules() for parameter in part.parameters(recurse=False)
    )
    hook: Any = getattr(owner, "_hf_hook", None)
    # Between calls an offloaded parameter is on meta.
    return torch.device(hook.execution_device) if parameter.is_meta and hook is not None else parameter.device


def dense_in_weight_layout(module: nn.Module, change: LowRank) -> Float[Tensor, "*shape"]:
    """Return ``change`` as a dense tensor in the layout of ``module``'s weight. For merging, not for training."""
    dense = change.dense(expert_count(module))
    if isinstance(module, nn.Conv2d):
        return dense.view(module.weight.shape)
    return dense.mT if is_conv1d(module) or (isinstance(module, ExpertLinear) and module.transposed) else dense


def weight_as_matrix(module: nn.Module, weight: Tensor) -> Float[Tensor, "*expert d_out d_in"]:
    """Return a tensor that has the layout of ``module``'s weight as a matrix [d_out, d_in]."""
    if isinstance(module, nn.Conv2d):
        return weight.flatten(1)
    return weight.mT if is_conv1d(module) or (isinstance(module, ExpertLinear) and module.transposed) else weight


def layer_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Float[Tensor, "*row d_in"], Int[Tensor, " row"] | None]:
    """Return the rows that a layer was called with, and for experts the index of each row's expert.

    The patches of a convolution are unfolded: [image, position, c_in·k·k].
    """
    # By position or by keyword: models call their layers either way.
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    floats = [value for value in tensors if value.is_floating_point()]
    assert len(floats) == 1, "a linear layer takes exactly one tensor"
    assert len(tensors) <= 2, "a layer of experts takes the experts' indices as well"
    experts = next((value for value in tensors if value is not floats[0]), None)
    x = floats[0]
    if isinstance(module, nn.Conv2d):
        x = nn.functional.unfold(x, module.kernel_size, stride=module.stride).mT
    return x, experts


def output_rows(module: nn.Module, output: Tensor) -> Float[Tensor, "*row d_out"]:
    """Return a layer's output, or the gradient of it, with the output dimension last: one row for each input row."""
    return output.flatten(-2).mT if isinstance(module, nn.Conv2d) else output


def rows_to_output(module: nn.Module, rows: Float[Tensor, "*row d_out"], output: Tensor) -> Tensor:
    """Return rows in the layout of the layer's ``output``: the inverse of :func:`output_rows`."""
    return rows.mT.reshape(output.shape) if isinstance(module, nn.Conv2d) else rows
