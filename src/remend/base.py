"""Which model an edit or an editor belongs to."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from remend.core.layers import is_editable, weight_of
from remend.errors import FileFormatError, ModelError, WrongBaseError, nearest
from remend.storage import take

_VOLATILE = {
    "_name_or_path", "architectures", "attn_implementation", "dtype", "quantization_config", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
"""Configuration keys that say how a model was loaded or saved, not which model it is."""


@dataclass(frozen=True)
class Base:
    """The identity of a base model, as far as an edit of it is concerned.

    Attributes:
        name: what the model was loaded as; for people, never compared.
        config: SHA-256 of the model's class and configuration.
        weights: for each edited module, SHA-256 of its weight rounded to bfloat16, so that the same checkpoint loaded
            in another dtype is still the same base.
    """

    name: str
    config: str
    weights: dict[str, str]

    @staticmethod
    def of(model: nn.Module, names: Iterable[str]) -> Base:
        """The identity of ``model`` with respect to the named modules."""
        modules = find_modules(model, names)
        return Base(_name(model), _config_hash(model), {name: _weight_hash(m) for name, m in modules.items()})

    @staticmethod
    def read(described: Mapping[str, Any], where: str | Path) -> Base:
        """The identity that a manifest describes (``asdict`` of one).

        Raises:
            FileFormatError: a part is missing or malformed.
        """
        weights = take(described, "weights", dict, where)
        if not all(isinstance(value, str) for value in weights.values()):
            raise FileFormatError(f"{where}: 'weights' of the base should give a hash for each module")
        return Base(take(described, "name", str, where), take(described, "config", str, where), weights)

    def check_architecture(self, model: nn.Module, what: str) -> None:
        """Raise :class:`WrongBaseError` unless ``model`` has the class and configuration that ``what`` was made for."""
        if _config_hash(model) != self.config:
            raise WrongBaseError(
                f"{what} was made for {self.name!r}; this model ({_name(model)!r}, {type(model).__name__}) has another "
                "class or configuration. Load the model it was made for"
            )

    def changed(self, model: nn.Module) -> list[str]:
        """The modules whose weights are not those of this base."""
        modules = find_modules(model, self.weights)
        return [name for name, module in modules.items() if _weight_hash(module) != self.weights[name]]

    def check(self, model: nn.Module, what: str) -> None:
        """Raise :class:`WrongBaseError` unless ``model`` is this base: same configuration, same edited weights."""
        self.check_architecture(model, what)
        if changed := self.changed(model):
            raise WrongBaseError(
                f"{what} was made for {self.name!r}, but the weights of {', '.join(changed[:3])} differ in this model. "
                "Load the unchanged base (or revert what was merged into it) and try again"
            )


def find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The named editable modules of ``model``.

    Raises:
        ModelError: a name is unknown, or names something that is not a linear layer.
    """
    known = dict(model.named_modules())
    found = {}
    for name in names:
        if name not in known:
            editable = [n for n, m in known.items() if is_editable(m)]
            raise ModelError(f"the model has no module {name!r}; {nearest(name, editable)}")
        if not is_editable(known[name]):
            raise ModelError(f"{name} is a {type(known[name]).__name__}; a Linear or Conv1D layer was expected")
        found[name] = known[name]
    return found


def _name(model: nn.Module) -> str:
    """What the model was loaded as: a hub id, or a folder's last name (no path of a machine ends up in a file)."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return PurePath(name).name if PurePath(name).is_absolute() or name.startswith(".") else name


def _config_hash(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    # The difference to the defaults: a later transformers release that adds a setting does not change it.
    described: dict[str, Any] = config.to_diff_dict() if config is not None and hasattr(config, "to_diff_dict") else {}
    kept = {key: value for key, value in described.items() if key not in _VOLATILE}
    text = json.dumps([type(model).__name__, kept], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


_Stamp = tuple[int, int, torch.dtype, float]
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[_Stamp, str]] = weakref.WeakKeyDictionary()
"""Hashes already taken. A weight is hashed again when its storage, its version or its sum has changed."""


def _weight_hash(module: nn.Module) -> str:
    weight = weight_of(module).detach()
    stamp = (weight.data_ptr(), weight._version, weight.dtype, float(weight.sum(dtype=torch.float64)))
    remembered = _seen.get(module)
    # NaN never equals itself, so a broken weight is hashed every time; that is harmless.
    if remembered is None or remembered[0] != stamp:
        _seen[module] = remembered = (stamp, _sha256(weight))
    return remembered[1]


def _sha256(weight: Tensor) -> str:
    rounded = weight.to(torch.bfloat16).cpu().contiguous()
    digest = hashlib.sha256(str(tuple(rounded.shape)).encode())
    digest.update(memoryview(rounded.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
