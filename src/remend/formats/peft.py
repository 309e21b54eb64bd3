"""Save edits as LoRA adapters of PEFT.

PEFT adds (alpha / r) · B A to a weight, with A [r, d_in] and B [d_out, r]. So A is ``u`` and B is ``delta``
transposed, with alpha = r: an edit of rank r is an adapter of rank r, and nothing is lost. Factors of a lower rank are
padded with zeros, so that one r and one alpha hold for all matrices: some readers divide alpha by the rank of each
matrix's own factors, others by the one r, and not all read PEFT's settings of single matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from remend.core.layers import dimensions, expert_count, is_conv1d, weight_of
from remend.edit import Edit
from remend.errors import EditError
from remend.fingerprint import HasModel, find_modules, model_location, module_of
from remend.formats.base import EditFormat, ImportedEdit
from remend.formats.peft_reading import CONFIG, KEY_PREFIX, WEIGHTS, load_adapter
from remend.saved_folders import atomic_folder, format_json

COMMON_RANK = 64
"""The largest rank that most servers of adapters take."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's ``--max-lora-rank`` takes."""


def save_adapter(edit: Edit, path: str | Path, task: HasModel | nn.Module) -> Path:
    """Write an edit as an adapter that PEFT, transformers' ``load_adapter`` and LoRA servers read; return the folder.

    Args:
        edit: the edit.
        path: a folder that is not there yet, or that holds an adapter.
        task: the model that the edit is for; it may be without weights (:func:`remend.models.skeleton`).

    Raises:
        EditError: the edit is gated or adds units, or changes experts.
        WrongBaseError: the model is of another class or configuration.
        FileError: ``path`` holds something else, or cannot be written.
    """
    model = module_of(task)
    modules = _checked_modules(edit, model)
    rank = max((change.rank for change in edit.changes.values()), default=1)
    config = _adapter_config(edit, model, rank, any(is_conv1d(module) for module in modules.values()))
    tensors: dict[str, Tensor] = {}
    for name, change in edit.changes.items():
        padding = (0, 0, 0, rank - change.rank)
        u, delta = (nn.functional.pad(factor, padding) for factor in (change.u, change.delta))
        delta = delta.mT
        if isinstance(modules[name], nn.Conv2d):  # PEFT's factors are convolutions too, the second one is 1x1
            u, delta = u.view(rank, *weight_of(modules[name]).shape[1:]), delta[:, :, None, None]
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
        change.raise_unless_of_weight("exported as an adapter")
        if expert_count(modules[name]):
            raise EditError(
                f"{name} holds several experts' matrices, which no LoRA adapter changes one by one; keep the edit as "
                "it is, or merge it (--to merged)"
            )
        if dimensions(modules[name]) != (change.u.shape[-1], change.delta.shape[-1]):
            raise EditError(f"{name} has shape {dimensions(modules[name])}, which is not the edit's")
    return modules


def _adapter_config(edit: Edit, model: nn.Module, rank: int, has_conv1d: bool) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for factors of one rank."""
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": model_location(model) or edit.base.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": has_conv1d,
        "target_modules": list(edit.changes),
        "rank_pattern": {},
        "alpha_pattern": {},
    }


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
