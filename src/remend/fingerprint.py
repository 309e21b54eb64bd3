"""Which model an edit or an editor belongs to."""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from remend.core.layers import describe_layer, editable_layers, is_editable, is_quantized, parameter_owner, weight_of
from remend.core.moe import expert_linears
from remend.errors import FileError, ModelError, WrongBaseError, nearest
from remend.serialization import get_field

_VOLATILE = re.compile(
    r"_name_or_path|architectures|_?attn_implementation\w*|_?experts_implementation\w*|dtype|torch_dtype|return_dict"
    r"|quantization_config|transformers_version|use_cache|output_\w+|\w*_token_ids?|\w*dropout\w*|\w*_pdrop|id2label"
    r"|label2id|task_specific_params|problem_type|pad_\w+"
)
"""Configuration keys that say how a model was saved, loaded, trained or decoded, not which function it computes."""


@dataclass(frozen=True)
class ModelFingerprint:
    """The identity of a base model, as far as an edit of it is concerned.

    Attributes:
        name: what the model was loaded as; for people, never compared.
        config: SHA-256 of the model's class and configuration.
        weights: for each edited module, SHA-256 of its weight rounded to bfloat16, so that a checkpoint is the same
            base whether it was loaded in float32 or bfloat16. (In float16 it need not be: that rounds differently.)
            Of a quantised weight, SHA-256 of what is stored (codes, scales and tables): a base of its own, the same at
            every load that quantises the same way.
    """

    name: str
    config: str
    weights: dict[str, str]

    @staticmethod
    def of(model: nn.Module, names: Iterable[str]) -> ModelFingerprint:
        """The identity of ``model`` with respect to the named modules."""
        modules = find_modules(model, names)
        return ModelFingerprint(
            _name(model), _config_hash(model), {name: _weight_hash(m) for name, m in modules.items()}
        )

    @staticmethod
    def from_manifest(described: Mapping[str, Any], where: str | Path) -> ModelFingerprint:
        """The identity that a manifest describes (``asdict`` of one).

        Raises:
            FileError: a part is missing or malformed.
        """
        weights = get_field(described, "weights", dict, where)
        if not all(isinstance(value, str) for value in weights.values()):
            raise FileError(f"{where}: 'weights' of the base should give a hash for each module")
        return ModelFingerprint(
            get_field(described, "name", str, where), get_field(described, "config", str, where), weights
        )

    def check_architecture(self, model: nn.Module, what: str) -> None:
        """Raise :class:`WrongBaseError` unless ``model`` has the class and configuration that ``what`` was made for."""
        if _config_hash(model) != self.config:
            raise WrongBaseError(
                f"{what} was made for {self.name!r}; this model ({_name(model)!r}, {type(model).__name__}) has another "
                "class or configuration. Load the model it was made for"
            )

    def recomputed_for(self, model: nn.Module) -> ModelFingerprint:
        """The identity of ``model``, which passed :meth:`check_architecture`, with respect to this base's modules."""
        modules = find_modules(model, self.weights)
        return ModelFingerprint(
            _name(model), self.config, {name: _weight_hash(module) for name, module in modules.items()}
        )

    def changed_modules(self, model: nn.Module) -> list[str]:
        """The modules whose weights are not those of this base."""
        return [name for name, own in self.recomputed_for(model).weights.items() if own != self.weights[name]]

    def check(self, model: nn.Module, what: str) -> None:
        """Raise :class:`WrongBaseError` unless ``model`` is this base: same configuration, same edited weights."""
        self.check_architecture(model, what)
        if changed := self.changed_modules(model):
            raise WrongBaseError(
                f"{what} was made for {self.name!r}, but the weights of {', '.join(changed[:3])} differ in this model "
                f"({getattr(model, 'dtype', 'unknown dtype')}). Load the unchanged base in the dtype it is stored in, "
                "in float32 or in bfloat16 (or revert what was merged into it) and try again; a quantised base must be "
                "quantised just as it was"
            )


def find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The named editable modules of ``model``.

    Raises:
        ModelError: a name is unknown, or names something that is not a linear layer.
    """
    found = {}
    for name in names:
        module = _module(model, name)
        if module is None:
            editable = [n for n, _ in editable_layers(model)]
            raise ModelError(f"the model has no module {name!r}; {nearest(name, editable)}")
        if not is_editable(module):
            raise ModelError(
                f"{name} is a {describe_layer(module)} and cannot be edited. Editable are Linear and Conv1D layers, "
                "experts, and only convolutions that are matrices: a Conv2d whose kernel is 1x1 or equals its stride, "
                "without padding, dilation or groups. Name another module"
            )
        found[name] = module
    return found


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of some name, of experts the one that stands for their parameter of that name."""
    parent, _, last = name.rpartition(".")
    try:
        holder = model.get_submodule(parent)
    except AttributeError:
        return None
    own = getattr(holder, last, None)
    return own if isinstance(own, nn.Module) else expert_linears(holder).get(last)


def _name(model: nn.Module) -> str:
    """What the model was loaded as: a hub id, or a folder's last name (no path of a machine ends up in a file)."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return PurePath(name).name if PurePath(name).is_absolute() or name.startswith(".") else name


def _config_hash(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    # The difference to the defaults: a later transformers release that adds a setting does not change it.
    described: dict[str, Any] = config.to_diff_dict() if config is not None and hasattr(config, "to_diff_dict") else {}
    text = json.dumps([type(model).__name__, _lasting(described)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _lasting(value: Any) -> Any:
    """A configuration without its volatile keys, nested ones included."""
    if isinstance(value, dict):
        return {str(k): _lasting(v) for k, v in value.items() if not _VOLATILE.fullmatch(str(k))}
    return value


def hash_model(model: nn.Module) -> str:
    """SHA-256 of everything that decides what ``model`` computes: class, configuration, and every stored byte.

    Raises:
        ModelError: some weights are offloaded, and would all have to be brought here.
    """
    digest = hashlib.sha256(_config_hash(model).encode())
    for name, stored in model.state_dict(keep_vars=True).items():
        for part, tensor in _unwrapped(name, stored) if isinstance(stored, Tensor) else ():
            if tensor.is_meta:
                raise ModelError(f"{name} is offloaded, so the model cannot be told from others: keep no cache on disk")
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{part} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(memoryview(plain.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


_Stamp = tuple[int, int, torch.dtype, float]
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[_Stamp, str]] = weakref.WeakKeyDictionary()
"""Hashes already taken. A weight is hashed again when its storage, its version or its sum has changed."""


def _weight_hash(module: nn.Module) -> str:
    with _brought(module):
        weight = weight_of(module).detach()
        parts = _stored(module) if is_quantized(module) else {str(tuple(weight.shape)): weight}
        first = next(iter(parts.values()))
        stamp = (first.data_ptr(), first._version, first.dtype, sum(_sum(part) for part in parts.values()))
        remembered = _seen.get(module)
        # NaN never equals itself, so a broken weight is hashed every time; that is harmless.
        if remembered is None or remembered[0] != stamp:
            _seen[module] = remembered = (stamp, _sha256(parts))
        return remembered[1]


def _brought(module: nn.Module) -> AbstractContextManager[None]:
    """Within the block, the module's weights are there to be read, also if Accelerate keeps them elsewhere.

    Raises:
        ModelError: nothing says where they are.
    """
    if not weight_of(module).is_meta:
        return nullcontext()
    holder = parameter_owner(module)
    if not getattr(getattr(holder, "_hf_hook", None), "offload", False):
        raise ModelError(
            f"the weight of a {type(module).__name__} to edit has no values (it is on the device meta); load the model "
            "with remend.load, with device='map' if it is larger than one device's memory"
        )
    from accelerate.utils import align_module_device

    brought: AbstractContextManager[None] = align_module_device(holder, torch.device("cpu"))
    return brought


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """The bytes of everything that a quantised weight consists of, as a checkpoint would hold it; the weight first."""
    state = module.state_dict()
    found: dict[str, Tensor] = {}
    for name in sorted(state.keys() - {"bias"}, key=lambda name: (name != "weight", name)):
        for part, tensor in _unwrapped(name, state[name]):
            found[f"{part} {tensor.dtype} {tuple(tensor.shape)}"] = tensor.detach().reshape(-1).view(torch.uint8)
    return found


def _unwrapped(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors inside of a tensor that wraps others, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _unwrapped(f"{name}.{part}", getattr(tensor, part))


def _sum(part: Tensor) -> float:
    return float(part.sum(dtype=torch.float32 if part.device.type == "mps" else torch.float64))


def _sha256(parts: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, part in parts.items():
        stored = (part.to(torch.bfloat16) if part.is_floating_point() else part).cpu().contiguous()
        digest.update(name.encode())
        digest.update(memoryview(stored.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
