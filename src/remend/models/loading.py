"""Loading a base model and its tokenizer: the shipped atlas, a local folder, or a hub id."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from remend.assets import ATLAS, ATLAS_FOLDER
from remend.errors import ModelError


def choose_device(device: str) -> torch.device:
    """The device for ``auto`` (a GPU where there is one) or the named one.

    Raises:
        ModelError: the device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    return chosen


def load(
    model: str, device: str = "auto", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        model: ``atlas`` (the small model that ships with remend), a local folder, or a hub id.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        dtype: of the weights; by default float32 on the CPU and the checkpoint's own elsewhere.

    Raises:
        ModelError: there is no such model, or it is not a causal language model with a tokenizer.
    """
    target = choose_device(device)
    source = str(ATLAS_FOLDER / "model") if model == ATLAS else model
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ModelError(f"{source} is not a model folder: it has no config.json")
    if not Path(source).exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ModelError(f"there is no folder {source}; MODEL is 'atlas', a folder or a hub id")
    chosen = dtype or (torch.float32 if target.type == "cpu" else "auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=chosen)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "the folder" if Path(source).exists() else "taken for a hub id, since no folder has this name"
        raise ModelError(f"cannot load {model!r} ({where}) as a causal language model: {reason}") from error
    loaded.config._name_or_path = model
    torch.nn.Module.to(loaded, target)
    return loaded.eval(), tokenizer
