"""Load LoRA adapters of PEFT as edits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from remend.bounded_regex import PatternError, PatternMatcher
from remend.core.layers import dimensions, editable_layers, expert_count, raise_if_shared
from remend.core.low_rank import LowRank, in_one_dtype
from remend.edit import Edit
from remend.errors import EditError, FileError, naming, nearest
from remend.fingerprint import HasModel, ModelFingerprint, find_modules, module_of
from remend.saved_folders import check_path, file_sha256, parse_json, read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
"""How the names of an adapter's tensors begin."""

_REFUSED: dict[str, str] = {
    "use_dora": "DoRA rescales the weights, which is no change of low rank",
    "lora_bias": "it adds biases",
    "modules_to_save": "it replaces whole modules",
    "layer_replication": "it repeats blocks of the model",
    "target_parameters": "it changes parameters that are no layer's weight",
    "trainable_token_indices": "it changes embeddings",
    "use_qalora": "QALoRA pools the inputs",
    "alora_invocation_tokens": "it acts only after certain tokens",
}
"""Settings with which an adapter is more than a low-rank change of matrices, and why."""

_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the base model's weights too, so that the adapter does not fit the original base."""

_OTHER_TOOLS = {"*.gguf": "llama.cpp (GGUF)", "adapters.safetensors": "MLX", "adapters.npz": "MLX"}
"""Files of adapters in other tools' formats, by a pattern of their names."""

_MAX_NUMBER = 1e30
"""A bound on ranks and scales: an integer of a file may be too large for a float."""


def load_adapter(path: str | Path, task: HasModel | nn.Module) -> Edit:
    """Load a LoRA adapter as an edit of a model, to inspect, evaluate and revert it.

    Args:
        path: the adapter's folder.
        task: the model that the adapter is for, with its weights.

    Raises:
        FileError: the folder holds no adapter, it is damaged, it does more than low-rank changes of matrices, or it
            changes modules that the model does not have.
        EditError: the matrices of the model have other shapes, or share their weight with other modules.
    """
    path, model = Path(path), module_of(task)
    config, tensors = _read(path)
    factors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    _check_copies({key: tensor for key, tensor in tensors.items() if key not in factors}, model, path)
    patterns = PatternMatcher()
    changes: dict[str, LowRank] = {}
    editable = {name for name, module in editable_layers(model) if not expert_count(module)}
    for name, pair in _factors_by_module(factors, path).items():
        # Factors of a convolution are flattened to those of its matrix.
        a, b = (f if f is None or f.dim() != 4 else f.flatten(1) for f in (pair.get("A"), pair.get("B")))
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise FileError(f"{path / WEIGHTS}: the factors of {name} are missing or do not fit together")
        if name not in editable:
            raise FileError(f"{path} changes {name}, which the model does not have; {nearest(name, editable)}")
        try:
            u, delta = in_one_dtype(a, b.mT)
        except EditError as error:
            raise FileError(f"{path / WEIGHTS}: the factors of {name} {error}") from None
        scale = _scale(config, name, a.shape[0], patterns, path)
        changes[name] = LowRank(u.float(), scale * delta.float().contiguous()).without_padding()
    raise_if_shared(model, changes, "an edit of one cannot be merged without the other, so it is not imported")
    modules = find_modules(model, changes)
    for name, change in changes.items():
        if dimensions(modules[name]) != (change.u.shape[-1], change.delta.shape[-1]):
            raise EditError(
                f"{path} changes {name} as if it were {change.u.shape[-1]} → {change.delta.shape[-1]}; in this model "
                f"it is {' → '.join(map(str, dimensions(modules[name])))}: is it the model that the adapter is for?"
            )
    editor = {"name": "lora", "sha256": file_sha256(path / WEIGHTS)}
    with naming(path):
        return Edit(changes, ModelFingerprint.of(model, changes), (), editor)


def _check_copies(others: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    """Check the tensors of an adapter that are no factors: PEFT saves weights of the base model with some adapters.

    Raises:
        FileError: one of them is not the model's own weight.
    """
    state = model.state_dict() if others else {}
    for key, tensor in others.items():
        name = re.sub(r"\.(base_layer|original_module|modules_to_save(\.\w+)?)(?=\.)", "", key.removeprefix(KEY_PREFIX))
        own = state.get(name)
        if own is None:
            raise FileError(
                f"{path / WEIGHTS}: {key} is no factor of a linear layer's change, so this is no plain LoRA"
            )
        if own.shape[1:] == tensor.shape[1:] and own.shape[:1] != tensor.shape[:1]:
            raise FileError(
                f"{path / WEIGHTS}: {key} has {len(tensor)} rows, the model's {len(own)}: the vocabulary was resized "
                "when the adapter was made. Import it for the model with the resized vocabulary (saved with "
                "save_pretrained)"
            )
        if own.shape != tensor.shape or not bool((own.to("cpu", tensor.dtype) == tensor).all()):
            raise FileError(
                f"{path / WEIGHTS}: {key} is a whole weight, and not the model's own: the adapter was trained with it, "
                "or is for another model. No edit changes it. If it was not trained, save the adapter again without it "
                "(save_pretrained(…, save_embedding_layers=False))"
            )


def _factors_by_module(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Group an adapter's tensors by module: its factors "A" and "B".

    Raises:
        FileError: there is none, one is given twice, or a tensor is something else.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight", key)
        if match is None:
            raise FileError(
                f"{path / WEIGHTS}: {key} is no factor of a linear layer's change, so this is no plain LoRA"
            )
        if (first := keys.setdefault((match[1], match[2]), key)) != key:
            raise FileError(
                f"{path / WEIGHTS}: {first} and {key} are the same factor, given twice: keep the adapter that is meant"
            )
        factors.setdefault(match[1], {})[match[2]] = tensor
    if not factors:
        raise FileError(f"{path / WEIGHTS} holds no factors")
    return factors


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Return the configuration and the tensors of an adapter.

    Raises:
        FileError: a file is missing or damaged, or the configuration makes it more than a low-rank change of matrices.
    """
    check_path(path)
    if not (path / CONFIG).is_file():
        raise FileError(f"{path} is not the folder of an adapter: it has no {CONFIG}.{_other_tool(path)}")
    try:
        config = parse_json((path / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path / CONFIG} is damaged, it is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise FileError(f"{path / CONFIG} should hold one object, it holds a {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise FileError(
            f"{path} is a {config.get('peft_type')!r} adapter; only LORA is a low-rank change of matrices."
            + _other_tool(path)
        )
    _check_settings(config, path)
    weights = path / WEIGHTS
    if not weights.is_file():
        has_bin = (path / "adapter_model.bin").exists()
        warning = " Its adapter_model.bin may hold code, and is never read." if has_bin else _other_tool(path)
        raise FileError(f"{path} has no {WEIGHTS}.{warning} Save the adapter with safetensors (PEFT's default)")
    return config, read_tensors(weights)


def _other_tool(path: Path) -> str:
    """Return a sentence that says which other tool's adapter a folder holds; empty if none is recognized."""
    tools = [tool for pattern, tool in _OTHER_TOOLS.items() if path.is_dir() and next(path.glob(pattern), None)]
    return f" It holds an adapter of {tools[0]}, which is not read: convert it to PEFT's format." if tools else ""


def _check_settings(config: Mapping[str, Any], path: Path) -> None:
    """Raise FileError where settings make an adapter more than a low-rank change of matrices."""
    for setting, why in _REFUSED.items():
        if config.get(setting):
            raise FileError(f"{path} has {setting}: {why}, so it is no edit")
    if config.get("bias", "none") != "none":
        raise FileError(f"{path} changes biases (bias = {config['bias']!r}), which is no change of a matrix")
    if not isinstance(config.get("use_rslora") or False, bool):
        raise FileError(f"{path / CONFIG}: use_rslora should be true or false, it is {config['use_rslora']!r}")
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_CHANGE_BASE):
        raise FileError(
            f"{path} was initialised by {initialization!r}, which changed the base model too: have PEFT convert it to "
            "a plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _scale(config: Mapping[str, Any], name: str, rank: int, patterns: PatternMatcher, path: Path) -> float:
    """Return the factor by which PEFT multiplies a matrix's B A."""
    r, alpha = (
        _module_setting(config, keys, name, patterns, path)
        for keys in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    for key, value in (("r", r), ("lora_alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_NUMBER:
            raise FileError(f"{path / CONFIG}: {key} of {name} should be a number, it is {str(value)[:40]!r}")
    if r != rank:
        raise FileError(f"{path}: {name} has factors of rank {rank}, and {CONFIG} says {r}; it was altered")
    return float(alpha / math.sqrt(r)) if config.get("use_rslora") else float(alpha / r)


def _module_setting(
    config: Mapping[str, Any], keys: tuple[str, str], name: str, patterns: PatternMatcher, path: Path
) -> Any:
    """Return a setting of one module: that of the first pattern which matches its name, or else the general one.

    As in PEFT, a pattern is a regular expression for the end of the name, from the beginning of one of its parts.

    Args:
        config: the adapter's configuration.
        keys: the key of the patterns, and that of the general setting.
        name: the module's name.
        patterns: matches names for the whole adapter.
        path: the adapter's folder, for messages.
    """
    settings = config.get(keys[0]) or {}
    if not isinstance(settings, dict):
        raise FileError(f"{path / CONFIG}: {keys[0]} should be an object, it is a {type(settings).__name__}")
    for pattern, value in settings.items():
        try:
            if patterns.fullmatch(rf"(.*\.)?({pattern})", name):
                return value
        except PatternError as error:
            raise FileError(f"{path / CONFIG}: the pattern {pattern[:80]!r} in {keys[0]} {error}") from None
    return config.get(keys[1])
