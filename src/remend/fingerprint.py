"""The identity of a base model: what decides whether an edit or an editor belongs to it. It is computed only here."""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from remend.assets import BUILT_IN_MODELS, model_folder
from remend.core.exclusive_execution import unwrap
from remend.core.layers import describe_layer, editable_layers, is_editable, is_quantized, parameter_owner, weight_of
from remend.core.moe import expert_linears
from remend.errors import FileError, ModelError, WrongBaseError, nearest
from remend.saved_folders import get_field

_VOLATILE = re.compile(
    r"_\w*name_or_path|architectures|_?attn_implementation\w*|_?experts_implementation\w*|dtype|torch_dtype|return_dict"
    r"|quantization_config|transformers_version|use_cache|output_\w+|\w*_token_ids?|\w*dropout\w*|\w*_pdrop|id2label"
    r"|label2id|task_specific_params|problem_type|pad_\w+"
)
"""Configuration keys that say how a model was saved, loaded, trained or decoded, not which function it computes."""


MAX_LISTED_SETTINGS = 4
"""How many settings in which models differ an error message lists."""


@dataclass(frozen=True)
class ModelFingerprint:
    """The identity of a base model with respect to the modules that an edit changes.

    Attributes:
        name: what the model was loaded as (:func:`model_name`); for people, never compared.
        config: SHA-256 of the model's class and configuration.
        weights: for each edited module, SHA-256 of its weight rounded to bfloat16, so that a checkpoint has the same
            identity whether it was loaded in float32 or bfloat16. (Float16 rounds differently, so there it may change.)
            For a quantised weight, SHA-256 of what is stored (codes, scales and tables): it differs from that of the
            unquantised weight and is the same at every load that quantises the same way.
        settings: the class and configuration that ``config`` is the hash of, for messages; empty in older files.
        in_folder: whether ``name`` is that of a local folder, so that nobody looks for it on the hub.
    """

    name: str
    config: str
    weights: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict, compare=False)
    in_folder: bool = field(default=False, compare=False)

    @staticmethod
    def of(model: nn.Module | HasModel, names: Iterable[str]) -> ModelFingerprint:
        """Compute the identity of a model, or of a task's, with respect to the named modules.

        Raises:
            ModelError: a name is no editable module, or a weight has no values.
        """
        return ModelFingerprint._of_module(module_of(model), names)

    @staticmethod
    def _of_module(module: nn.Module, names: Iterable[str]) -> ModelFingerprint:
        name = model_name(module)
        in_folder = name not in BUILT_IN_MODELS and model_location(module) is not None
        weights = _weight_hashes(module, names)
        return ModelFingerprint(name, _config_hash(module), weights, _settings(module), in_folder)

    @staticmethod
    def from_manifest(described: Mapping[str, Any], where: str | Path) -> ModelFingerprint:
        """Read the identity that a manifest holds (``dataclasses.asdict`` of one).

        Args:
            described: the part of the manifest.
            where: the file or folder, for messages.

        Raises:
            FileError: a field is missing or malformed.
        """
        weights = get_field(described, "weights", dict, where)
        if not all(isinstance(value, str) for value in weights.values()):
            raise FileError(f"{where}: 'weights' of the base should hold a hash for each module")
        settings = get_field(described, "settings", dict, where) if "settings" in described else {}
        in_folder = get_field(described, "in_folder", bool, where) if "in_folder" in described else False
        name, config = (get_field(described, key, str, where) for key in ("name", "config"))
        return ModelFingerprint(name, config, weights, settings, in_folder)

    def check_architecture(self, model: nn.Module, what: str) -> None:
        """Raise :class:`WrongBaseError` unless ``model`` has the class and configuration that ``what`` was made for."""
        if _config_hash(model) != self.config:
            raise WrongBaseError(
                f"{what} was made for {self.name!r}; this model ({model_name(model)!r}, {type(model).__name__}) has "
                f"another class or configuration{self._describe_differences(model)}. Load the model it was made for"
            )

    def _describe_differences(self, model: nn.Module) -> str:
        """Return a clause that names the settings in which ``model`` differs; empty where they are not known."""
        if not self.settings:
            return ""
        here, there = (dict(_flat_settings(settings)) for settings in (_settings(model), self.settings))
        differing = sorted(key for key in here.keys() | there.keys() if here.get(key, ...) != there.get(key, ...))
        differing = ["class"] if "class" in differing else differing  # of another class, most settings differ
        listed = (
            f"{key} is {_shown(here.get(key, ...))} here and {_shown(there.get(key, ...))} there"
            for key in differing[:MAX_LISTED_SETTINGS]
        )
        more = " …" if len(differing) > MAX_LISTED_SETTINGS else ""
        resized = {key.rpartition(".")[2] for key in differing} == {"vocab_size"}
        why = ". The vocabulary was resized, and what was made before fits only the model before" if resized else ""
        return f" ({', '.join(listed)}{more}){why}" if differing else ""

    def recomputed_for(self, model: nn.Module) -> ModelFingerprint:
        """Compute the identity of ``model`` for the same modules; the model has passed :meth:`check_architecture`."""
        return ModelFingerprint._of_module(model, self.weights)

    def changed_modules(self, model: nn.Module) -> list[str]:
        """Return the names of the modules whose weights differ in ``model``."""
        return [name for name, digest in self.recomputed_for(model).weights.items() if digest != self.weights[name]]

    def check(self, model: nn.Module, what: str) -> None:
        """Raise :class:`WrongBaseError` unless ``model`` is this base: same configuration, same edited weights.

        Args:
            model: the model.
            what: what was made for this base, for the message ("this edit").
        """
        self.check_architecture(model, what)
        if changed := self.changed_modules(model):
            raise WrongBaseError(
                f"{what} was made for {self.name!r}, but the weights of {', '.join(changed[:3])} differ in this model "
                f"({getattr(model, 'dtype', 'unknown dtype')}). Load the unchanged base in the dtype it is stored in, "
                "in float32 or in bfloat16 (or revert what was merged into it) and try again; a quantised base must be "
                "quantised just as it was"
            )

    def is_compatible(self, other: ModelFingerprint) -> bool:
        """Return whether both may be of the same model: one configuration, and no module with different weights."""
        common = self.weights.keys() & other.weights.keys()
        return self.config == other.config and all(self.weights[name] == other.weights[name] for name in common)

    def union(self, other: ModelFingerprint) -> ModelFingerprint:
        """Return the identity with respect to the modules of both, which must be compatible."""
        return replace(self, weights={**self.weights, **other.weights})

    def digest(self) -> str:
        """Return one SHA-256 of configuration and weights."""
        return hashlib.sha256(json.dumps([self.config, self.weights]).encode()).hexdigest()


@runtime_checkable
class HasModel(Protocol):
    """An object that holds a model and its tokenizer or other processor, such as a :class:`remend.Task`."""

    model: Any
    processor: Any


def module_of(model: nn.Module | HasModel) -> nn.Module:
    """Return the module itself, or the one that a task holds, without what is wrapped around it (:func:`unwrap`).

    Raises:
        ModelError: the wrapper hides the model's modules or weights.
    """
    module: Any = model if isinstance(model, nn.Module) else model.model
    assert isinstance(module, nn.Module)
    return unwrap(module)


def find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the named editable modules of ``model``.

    Raises:
        ModelError: a name is unknown, or names a layer of a kind that cannot be edited.
    """
    modules = {}
    for name in names:
        module = _find_module(model, name)
        if module is None:
            editable = [n for n, _ in editable_layers(model)]
            raise ModelError(f"the model has no module {name!r}; {nearest(name, editable)}")
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ModelError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}, an adapter of PEFT around the layer: "
                "apply the edit before the adapter is added (it goes on acting), or merge or unload the adapter first"
            )
        if not is_editable(module):
            raise ModelError(
                f"{name} is a {describe_layer(module)} and cannot be edited. Editable are Linear and Conv1D layers, "
                "experts, and only convolutions that are matrices: a Conv2d whose kernel is 1x1 or equals its stride, "
                "without padding, dilation or groups. Name another module"
            )
        modules[name] = module
    return modules


def _find_module(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module of a name; of experts, the module that stands for their parameter of that name."""
    parent, _, last = name.rpartition(".")
    try:
        holder = model.get_submodule(parent)
    except AttributeError:
        return None
    child = getattr(holder, last, None)
    return child if isinstance(child, nn.Module) else expert_linears(holder).get(last)


def model_name(model: nn.Module) -> str:
    """Return what the model was loaded as: a hub id, or the last part of a folder's path; its class if nothing says.

    Names are written into files that are shared, so they hold no path of a machine.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return PurePath(name).name if PurePath(name).is_absolute() or name.startswith(".") else name


def model_location(model: nn.Module) -> str | None:
    """Return the absolute path of the folder that a model was loaded from; None if it was loaded from no folder."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if name in BUILT_IN_MODELS:
        return str(model_folder(name))
    folder = Path(name).parent if Path(name).is_file() else Path(name)  # a configuration alone may be named too
    return str(folder.absolute()) if name and folder.is_dir() else None


def _config_hash(model: nn.Module) -> str:
    text = json.dumps([type(model).__name__, _own_settings(model)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _own_settings(model: nn.Module) -> Any:
    """Return a model's configuration without volatile keys, as the difference to the defaults."""
    config = getattr(model, "config", None)
    # The difference to the defaults: a later transformers release that adds a setting does not change it.
    settings: dict[str, Any] = config.to_diff_dict() if config is not None and hasattr(config, "to_diff_dict") else {}
    return _without_volatile(settings)


def _settings(model: nn.Module) -> dict[str, Any]:
    """Return what :func:`_config_hash` is the hash of as a JSON object."""
    own = json.dumps({"class": type(model).__name__, **_own_settings(model)}, default=str)
    settings: dict[str, Any] = json.loads(own, parse_constant=str)  # JSON knows no infinity
    return settings


def _flat_settings(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a configuration, those of nested ones under names with dots."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    """Return a setting for a message; ``...`` stands for one that has its default value."""
    return "the default" if value is ... else repr(value)[:60]


def _without_volatile(value: Any) -> Any:
    """Return a configuration without its volatile keys, nested ones included."""
    if isinstance(value, dict):
        return {str(k): _without_volatile(v) for k, v in value.items() if not _VOLATILE.fullmatch(str(k))}
    return value


def hash_model(model: nn.Module) -> str:
    """Return SHA-256 of all that decides what ``model`` computes: class, configuration, and every stored byte.

    It reads all weights. :class:`ModelFingerprint` reads only those of some modules, and allows for another dtype.

    Raises:
        ModelError: some weights are offloaded; all of them would have to be loaded.
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
_hashed: weakref.WeakKeyDictionary[nn.Module, tuple[_Stamp, str]] = weakref.WeakKeyDictionary()
"""Hashes by module. A weight is hashed again when its storage, its version or its sum has changed."""


def _weight_hashes(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    return {name: _weight_hash(module) for name, module in find_modules(model, names).items()}


def _weight_hash(module: nn.Module) -> str:
    with _weights_on_cpu(module):
        weight = weight_of(module).detach()
        parts = _stored_parts(module) if is_quantized(module) else {str(tuple(weight.shape)): weight}
        first = next(iter(parts.values()))
        # The version counts writes in place, but not those through `.data`, which the sum shows.
        stamp = (first.data_ptr(), first._version, first.dtype, sum(_sum(part) for part in parts.values()))
        previous = _hashed.get(module)
        # NaN never equals itself, so a broken weight is hashed every time; that is harmless.
        if previous is None or previous[0] != stamp:
            _hashed[module] = previous = (stamp, _sha256(parts))
        return previous[1]


def _weights_on_cpu(module: nn.Module) -> AbstractContextManager[None]:
    """Load weights that Accelerate offloads to the CPU within the context; others are left where they are.

    Raises:
        ModelError: the weights have no values, and nothing offloads them.
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

    aligned: AbstractContextManager[None] = align_module_device(holder, torch.device("cpu"))
    return aligned


def _stored_parts(module: nn.Module) -> dict[str, Tensor]:
    """Return the bytes of all that a quantised weight consists of, as a checkpoint would hold it; the weight first."""
    state = module.state_dict()
    parts: dict[str, Tensor] = {}
    for name in sorted(state.keys() - {"bias"}, key=lambda name: (name != "weight", name)):
        for part, tensor in _unwrapped(name, state[name]):
            parts[f"{part} {tensor.dtype} {tuple(tensor.shape)}"] = tensor.detach().reshape(-1).view(torch.uint8)
    return parts


def _unwrapped(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors inside a tensor subclass that wraps others, or the tensor itself, with their names."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _unwrapped(f"{name}.{part}", getattr(tensor, part))


def _sum(part: Tensor) -> float:
    # MPS has no float64.
    return float(part.sum(dtype=torch.float32 if part.device.type == "mps" else torch.float64))


def _sha256(parts: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, part in parts.items():
        # In bfloat16, so that a checkpoint loaded in float32 or bfloat16 is the same base.
        stored = (part.to(torch.bfloat16) if part.is_floating_point() else part).cpu().contiguous()
        digest.update(name.encode())
        digest.update(memoryview(stored.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
