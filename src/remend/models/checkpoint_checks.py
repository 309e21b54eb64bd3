"""Check a model's folder and configuration before they are loaded, and what was loaded afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from remend.errors import ModelError

SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
"""Sizes that configurations have under these names, also where their own names for them are others."""

LARGEST = {"layer": 1_000, "block": 100_000, "depth": 1_000, "label": 1_000_000, "": 2**40}
"""The largest integers of a configuration, by a part of the name. A configuration makes lists of some of them."""

MAX_PARAMETERS_PER_BYTE = 8
"""No checkpoint stores more parameters in a byte; a configuration of more describes another model."""

MAX_LISTED_KEYS = 4


def check_folder(folder: Path) -> None:
    """Raise ModelError where a folder holds no checkpoint that transformers loads, and name what it holds instead."""
    weights = next((file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)), None)
    if weights is None and (gguf := next(folder.glob("*.gguf"), None)):
        raise ModelError(
            f"{folder} holds a model of llama.cpp (GGUF): give the path of its file, {gguf}, or the checkpoint that it "
            "was made of"
        )
    if (folder / "adapter_config.json").is_file():
        hint = "give the folder of the base model, and make an edit of the adapter with remend import"
        raise ModelError(f"{folder} holds an adapter, which would be loaded with the model: {hint}")
    if next(folder.glob("*.npz"), None) and not next(folder.glob("*.safetensors"), None):
        raise ModelError(f"{folder} is a model of MLX, which transformers does not read: give the original checkpoint")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    for index in folder.glob("*.index.json"):
        for name in _files_of_index(index):
            if name != PurePosixPath(name).name or name in ("", ".", ".."):
                raise ModelError(f"{index} names the file {name[:80]!r}, which is not in the folder: it was altered")


def _files_of_index(index: Path) -> list[str]:
    """Return the names of the files that an index lists."""
    try:
        files = json.loads(index.read_bytes())["weight_map"].values()
        return [str(name) for name in files]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of weights ({type(error).__name__}: {str(error)[:80]})") from None


def check_settings(settings: Mapping[str, Any], source: str, trust_remote_code: bool) -> None:
    """Check a configuration as it is stored, before anything is made of it.

    Raises:
        ModelError: it names code on the hub, is one of MLX's quantised models, or holds absurd numbers.
    """
    if isinstance(quantised := settings.get("quantization"), dict) and "group_size" in quantised:
        raise ModelError(
            f"{source} is a quantised model of MLX, which transformers does not read: give the checkpoint that it was "
            "made of"
        )
    for key, value in _all_settings(settings):
        if "implementation" in key and isinstance(value, str) and "/" in value and not trust_remote_code:
            raise ModelError(
                f"the configuration of {source} has {key} = {value[:80]!r}, which is code on the hub. Remove the "
                "setting, or load the model with trust_remote_code (remend --trust-remote-code …) if you trust it"
            )
        if isinstance(value, int) and abs(value) > (most := next(n for part, n in LARGEST.items() if part in key)):
            raise ModelError(f"the configuration of {source} has {key} = {str(value)[:30]}; the most is {most:,}")


def _all_settings(settings: Any) -> Iterator[tuple[str, Any]]:
    """Yield all settings of a configuration, those of nested ones too; of a list, each item."""
    for key, value in settings.items():
        if key in ("id2label", "label2id"):  # its keys are the users' words
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from _all_settings(item)
            else:
                yield str(key), item


def check_sizes(config: Any, source: str) -> None:
    """Raise ModelError where a size of a configuration, or of one inside it, is zero or negative."""
    for key in SIZES:
        value = getattr(config, key, None)
        if isinstance(value, int) and value < 1:
            own = config.attribute_map.get(key, key)
            raise ModelError(f"the configuration of {source} has {own} = {value}; it has to be at least 1")
    for inner in vars(config).values():
        if isinstance(inner, transformers.PreTrainedConfig):
            check_sizes(inner, source)


def check_room(model_class: Any, config: Any, path: Path, trust_remote_code: bool) -> None:
    """Raise ModelError where a configuration describes a model far larger than the weights in its folder or file.

    Transformers would make room for all of it, with random numbers where the folder has none.
    """
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    stored = sum(file.stat().st_size for file in files)
    with torch.device("meta"):
        model = model_class.from_config(config, trust_remote_code=trust_remote_code)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if stored and parameters > MAX_PARAMETERS_PER_BYTE * stored:
        raise ModelError(
            f"cannot load {path}: its configuration describes a model of {parameters:,} parameters, and the weights "
            f"with it are {stored:,} bytes: these were truncated, or one of them belongs to another model"
        )


def check_loaded(model: Any, saved_class: str | None, loading: Mapping[str, Any], source: str) -> None:
    """Check that a loaded model is the one that was saved: all weights, and the same head.

    Args:
        model: the model.
        saved_class: the name of the class that was saved, if the configuration says.
        loading: what ``from_pretrained`` says of the weights (``output_loading_info``).
        source: the model's name, for messages.

    Raises:
        ModelError: weights are missing, have other shapes or are left over, or the head is of another task.
    """
    kind = type(model).__name__
    if mismatched := sorted(loading["mismatched_keys"]):
        shapes = [f"{key} is {tuple(stored)}, and should be {tuple(own)}" for key, stored, own in mismatched]
        raise ModelError(
            f"weights of {source} do not have the shapes that its config.json gives: {_listed(shapes, '; ')}. If the "
            "head or the vocabulary was resized, save the model again (save_pretrained), with its configuration"
        )
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{source} has no weights for {_listed(missing)}: as a {kind} it would answer with random numbers"
            + (f". It was saved as a {saved_class}" if saved_class and saved_class != kind else "")
            + ". Give a checkpoint that was trained for this task"
        )
    if extra := [key for key in sorted(loading["unexpected_keys"]) if _belongs(key, model)]:
        raise ModelError(
            f"{source} has weights that a {kind} of its config.json leaves out: {_listed(extra)}. The configuration is "
            "of another model"
        )
    _check_head(model, saved_class, source)


def _check_head(model: Any, saved_class: str | None, source: str) -> None:
    """Raise ModelError where a model that writes text was saved as one that does not."""
    kind = type(model).__name__
    saved: Any = getattr(transformers, saved_class or "", None)
    same = saved is None or saved_class in (kind, type(model.base_model).__name__)
    if not same and saved.can_generate() != model.can_generate():
        raise ModelError(
            f"{source} was saved as a {saved_class}, which is for another task than a {kind}: its head would be asked "
            "what it was not trained for. Give a language model, or a classifier of texts or images"
        )
    check_head(model, source)


def check_head(model: nn.Module, source: str) -> None:
    """Check that a model of transformers writes text from left to right, or classifies texts or images.

    Raises:
        ModelError: it is an encoder whose tokens see those after them, or has another head, or none.
    """
    if not isinstance(model, transformers.PreTrainedModel) or not type(model).__module__.startswith("transformers."):
        return  # a class of somebody else may be anything
    kind, config = type(model).__name__, type(model.config)
    mappings: list[Any] = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING]
    found = [mapping.get(config, ()) for mapping in mappings]
    classifiers = tuple(c for classes in found for c in (classes if isinstance(classes, tuple) else (classes,)))
    if not model.can_generate() and not isinstance(model, classifiers):
        raise ModelError(
            f"{source} is a {kind}, neither a language model nor a sequence classifier or image classifier: its head, "
            "if it has one, is for another task"
        )
    encoder = MODEL_FOR_MASKED_LM_MAPPING.get(config, type(model))
    if model.can_generate() and encoder is not type(model) and getattr(model.config, "is_decoder", True) is False:
        raise ModelError(
            f"{source} is an encoder, whose tokens see those after them, and would be asked as a {kind} that writes "
            "from left to right. If it was trained so, its config.json has to say is_decoder = true"
        )


def _belongs(key: str, model: Any) -> bool:
    """Return whether a weight that was left over belongs to a module of the model, or to one more of its blocks."""
    module, _, parameter = key.rpartition(".")
    if parameter not in ("weight", "bias"):
        return False  # buffers that earlier releases of transformers saved
    modules = dict(model.named_modules())
    if module in modules:
        return bool(module)
    forms = {re.sub(r"\d+", "#", name) for name in modules}
    return "#" in (form := re.sub(r"\d+", "#", module)) and form in forms


def _listed(keys: list[str], separator: str = ", ") -> str:
    """Return some keys for a message, and how many there are."""
    more = f" … ({len(keys)} in all)" if len(keys) > MAX_LISTED_KEYS else ""
    return separator.join(keys[:MAX_LISTED_KEYS]) + more
