"""Save edits as LoRA adapters of PEFT, and load adapters as edits.

PEFT adds (alpha / r) · B A to a weight, with A [r, d_in] and B [d_out, r]. So A is ``u`` and B is ``delta``
transposed, with alpha = r: an edit of rank r is an adapter of rank r, and nothing is lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from remend.core.layers import dimensions, editable_layers, expert_count, is_conv1d, weight_of
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.errors import EditError, FileError, nearest
from remend.fingerprint import HasModel, ModelFingerprint, find_modules, module_of
from remend.formats.base import EditFormat, ImportedEdit
from remend.serialization import atomic_folder, file_sha256, format_json, parse_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
"""How the names of an adapter's tensors begin."""

COMMON_RANK = 64
"""The largest rank that most servers of adapters take."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's ``--max-lora-rank`` takes."""

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

_MAX_NUMBER = 1e30
"""A bound on ranks and scales: an integer of a file may be too large for a float."""

_REGEX_PARTS = {r"\d+": r"\d+", "[0-9]+": r"\d+", ".*": ".*"}
"""The regular expressions that are understood in an adapter's patterns."""


def save_adapter(edit: Edit, path: str | Path, task: HasModel | nn.Module) -> Path:
    """Write an edit as an adapter that PEFT, transformers' ``load_adapter`` and LoRA servers read; return the folder.

    Args:
        edit: the edit.
        path: a folder that is not there yet, or that holds an adapter.
        task: the model that the edit is for; it may be without weights (:func:`remend.models.skeleton`).

    Raises:
        EditError: the edit is gated, or changes experts.
        WrongBaseError: the model is of another class or configuration.
        FileError: ``path`` holds something else, or cannot be written.
    """
    model = module_of(task)
    modules = _checked_modules(edit, model)
    config = _adapter_config(edit, model, any(is_conv1d(module) for module in modules.values()))
    tensors: dict[str, Tensor] = {}
    for name, change in edit.changes.items():
        u, delta = change.u, change.delta.mT
        if isinstance(modules[name], nn.Conv2d):  # PEFT's factors are convolutions too, the second one is 1x1
            u, delta = u.view(change.rank, *weight_of(modules[name]).shape[1:]), delta[:, :, None, None]
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = u
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = delta
    with atomic_folder(path, _is_adapter) as staged:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, staged / WEIGHTS)
        (staged / CONFIG).write_text(format_json(config), encoding="utf-8")
    return Path(path)


def _checked_modules(edit: Edit, model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that an edit changes, after checking that it can be an adapter of ``model``."""
    edit.base.check_architecture(model, "this edit")
    modules = find_modules(model, edit.changes)
    for name, change in edit.changes.items():
        change.raise_if_gated("exported as an adapter")
        if expert_count(modules[name]):
            raise EditError(
                f"{name} holds several experts' matrices, which no LoRA adapter changes one by one; keep the edit as "
                "it is, or merge it (--to merged)"
            )
        if dimensions(modules[name]) != (change.u.shape[-1], change.delta.shape[-1]):
            raise EditError(f"{name} has shape {dimensions(modules[name])}, which is not the edit's")
    return modules


def _adapter_config(edit: Edit, model: nn.Module, has_conv1d: bool) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``."""
    ranks = {name: change.rank for name, change in edit.changes.items()}
    largest = max(ranks.values(), default=1)
    # alpha / r is 1 for every matrix, also for servers that read `r` and `lora_alpha` but not the patterns.
    smaller = {name: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": edit.base.name,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": has_conv1d,
        "target_modules": list(ranks),
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
    }


def load_adapter(path: str | Path, task: HasModel | nn.Module) -> Edit:
    """Load a LoRA adapter as an edit of a model, to inspect, evaluate and revert it.

    Args:
        path: the adapter's folder.
        task: the model that the adapter is for, with its weights.

    Raises:
        FileError: the folder holds no adapter, it is damaged, it does more than low-rank changes of matrices, or it
            changes modules that the model does not have.
        EditError: the matrices of the model have other shapes.
    """
    path, model = Path(path), module_of(task)
    config, tensors = _read(path)
    changes: dict[str, LowRank] = {}
    editable = {name for name, module in editable_layers(model) if not expert_count(module)}
    for name, pair in _factors_by_module(tensors, path).items():
        # Factors of a convolution are flattened to those of its matrix.
        a, b = (f if f is None or f.dim() != 4 else f.flatten(1) for f in (pair.get("A"), pair.get("B")))
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise FileError(f"{path / WEIGHTS}: the factors of {name} are missing or do not fit together")
        if name not in editable:
            raise FileError(f"{path} changes {name}, which the model does not have; {nearest(name, editable)}")
        changes[name] = LowRank(a.float(), _scale(config, name, a.shape[0], path) * b.float().mT.contiguous())
    modules = find_modules(model, changes)
    for name, change in changes.items():
        if dimensions(modules[name]) != (change.u.shape[-1], change.delta.shape[-1]):
            raise EditError(
                f"{path} changes {name} as if it were {change.u.shape[-1]} → {change.delta.shape[-1]}; in this model "
                f"it is {' → '.join(map(str, dimensions(modules[name])))}: is it the model that the adapter is for?"
            )
    editor = {"name": "lora", "sha256": file_sha256(path / WEIGHTS)}
    return Edit(changes, ModelFingerprint.of(model, changes), (), editor)


def _factors_by_module(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Group an adapter's tensors by module: its factors "A" and "B".

    Raises:
        FileError: there is none, or a tensor is something else.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight", key)
        if match is None:
            raise FileError(
                f"{path / WEIGHTS}: {key} is no factor of a linear layer's change, so this is no plain LoRA"
            )
        factors.setdefault(match[1], {})[match[2]] = tensor
    if not factors:
        raise FileError(f"{path / WEIGHTS} holds no factors")
    return factors


def _is_adapter(path: Path) -> bool:
    """Return whether a folder holds an adapter and nothing else, so that a new one may replace it."""
    names = {entry.name for entry in path.iterdir()}
    return names <= {CONFIG, WEIGHTS} and CONFIG in names


def _task_type(model: nn.Module) -> str | None:
    """Return PEFT's name of the task, or None for classifiers."""
    # With "SEQ_CLS", PEFT expects the classifier's head in the adapter too.
    find_head = getattr(model, "get_output_embeddings", None)
    if not isinstance(find_head() if callable(find_head) else None, nn.Module):
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Return the configuration and the tensors of an adapter.

    Raises:
        FileError: a file is missing or damaged, or the configuration makes it more than a low-rank change of matrices.
    """
    if not (path / CONFIG).is_file():
        raise FileError(f"{path} is not the folder of an adapter: it has no {CONFIG}")
    try:
        config = parse_json((path / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path / CONFIG} is damaged, it is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise FileError(f"{path / CONFIG} should hold one object, it holds a {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise FileError(f"{path} is a {config.get('peft_type')!r} adapter; only LORA is a low-rank change of matrices")
    for setting, why in _REFUSED.items():
        if config.get(setting):
            raise FileError(f"{path} has {setting}: {why}, so it is no edit")
    if config.get("bias", "none") != "none":
        raise FileError(f"{path} changes biases (bias = {config['bias']!r}), which is no change of a matrix")
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_CHANGE_BASE):
        raise FileError(
            f"{path} was initialised by {initialization!r}, which changed the base model too: have PEFT convert it to "
            "a plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    weights = path / WEIGHTS
    if not weights.is_file():
        has_bin = (path / "adapter_model.bin").exists()
        warning = " Its adapter_model.bin may hold code, and is never read." if has_bin else ""
        raise FileError(f"{path} has no {WEIGHTS}.{warning} Save the adapter with safetensors (PEFT's default)")
    try:
        return config, load_file(weights)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{weights} is not a safetensors file ({error})") from None


def _scale(config: Mapping[str, Any], name: str, rank: int, path: Path) -> float:
    """Return the factor by which PEFT multiplies a matrix's B A."""
    r, alpha = (
        _module_setting(config, keys, name, path) for keys in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    for key, value in (("r", r), ("lora_alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_NUMBER:
            raise FileError(f"{path / CONFIG}: {key} of {name} should be a number, it is {value!r}")
    if r != rank:
        raise FileError(f"{path}: {name} has factors of rank {rank}, and {CONFIG} says {r}; it was altered")
    return float(alpha / math.sqrt(r)) if config.get("use_rslora") else float(alpha / r)


def _module_setting(config: Mapping[str, Any], keys: tuple[str, str], name: str, path: Path) -> Any:
    """Return a setting of one module: that of the first pattern which matches its name, or else the general one.

    Args:
        config: the adapter's configuration.
        keys: the key of the patterns, and that of the general setting.
        name: the module's name.
        path: the adapter's folder, for messages.
    """
    patterns = config.get(keys[0]) or {}
    if not isinstance(patterns, dict):
        raise FileError(f"{path / CONFIG}: {keys[0]} should be an object, it is a {type(patterns).__name__}")
    matches = (value for pattern, value in patterns.items() if _matches(pattern, name, path))
    return next(matches, config.get(keys[1]))


def _matches(pattern: str, name: str, path: Path) -> bool:
    r"""Return whether a pattern matches the end of a module's name; ``\d+`` is a number and ``.*`` anything.

    Raises:
        FileError: the pattern holds other regular expressions.
    """
    # PEFT accepts any regular expression. One from a file could be made to run forever, so only these are read.
    text = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
    parts = re.split(r"(\\d\+|\[0-9\]\+|\.\*)", text)
    if any(re.search(r"[^\w.\-]", part) for part in parts[::2]):
        raise FileError(
            f"{path / CONFIG}: the pattern {pattern!r} is more than names with {', '.join(_REGEX_PARTS)} in them"
        )
    start = "" if pattern.startswith("^") else r"(?:.*\.)?"
    return re.fullmatch(start + "".join(_REGEX_PARTS.get(part) or re.escape(part) for part in parts), name) is not None


class PeftFormat(EditFormat):
    """LoRA adapters of PEFT."""

    needs: ClassVar[Literal["nothing", "structure", "weights"]] = "structure"

    def write(self, edit: Edit, path: Path, task: Any) -> Mapping[str, float]:
        """Write an edit as an adapter. See :meth:`EditFormat.write` and :func:`save_adapter`."""
        save_adapter(edit, path, task)
        return {}

    def replaceable(self, path: Path) -> bool:
        """Return whether the folder holds an adapter and nothing else."""
        return _is_adapter(path)

    def usage(self, edit: Edit) -> Sequence[str]:
        """Return how to load and serve the adapter."""
        largest = max((change.rank for change in edit.changes.values()), default=1)
        lines = [
            "In Python: peft.PeftModel.from_pretrained(model, DIR), or model.load_adapter(DIR). Served: vllm serve "
            f"MODEL --enable-lora --max-lora-rank {_vllm_rank(largest)} --lora-modules NAME=DIR"
        ]
        if largest > COMMON_RANK:
            lines.insert(0, "servers limit ranks: --rank N compresses it, and says what is lost")
        return lines

    def detect(self, path: Path) -> bool:
        """Return whether the folder has the configuration of an adapter."""
        return (path / CONFIG).exists()

    def read(
        self, path: Path, task: HasModel, load: Callable[[Path], HasModel], rank: int | None = None
    ) -> ImportedEdit:
        """Read an adapter. See :meth:`EditFormat.read` and :func:`load_adapter`."""
        edit = load_adapter(path, task)
        edit = edit.compressed(rank) if rank is not None else edit
        return ImportedEdit(edit, edit.editor.get("lost", {}))


def _vllm_rank(rank: int) -> int:
    """Return the smallest ``--max-lora-rank`` of vLLM that is enough."""
    return next((size for size in VLLM_RANKS if size >= rank), rank)
