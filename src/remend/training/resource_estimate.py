"""Estimates what training an editor takes from a model's configuration alone, without creating any weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remend.core.layers import dimensions
from remend.editors.mend.config import MendConfig
from remend.editors.mend.editor import Mend
from remend.fingerprint import ModelFingerprint
from remend.models.blocks import find_stacks
from remend.models.editable_matrices import editable_modules
from remend.models.loading import skeleton
from remend.training.config import PRESETS
from remend.training.memory_estimate import bytes_of

GPUS = (1, 2, 4, 8)
"""The numbers of GPUs that share the model's weights for which the memory is estimated."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


@dataclass(frozen=True)
class ResourceEstimate:
    """The result of :func:`dry_run`.

    Attributes:
        model: the configuration's folder or file.
        parameters: the number of parameters of the base model.
        blocks: the number of blocks of each of its stacks.
        matrices: (d_in, d_out) of each matrix that would be edited, by name.
        editor_parameters: the number of parameters of the editor.
        model_bytes: the bytes of the base model's weights.
        editor_bytes: the bytes of the editor's parameters and statistics, in float32.
        training_bytes: what training takes in addition: Adam's moments and one gradient, or, before the first step, the
            moments of the layers' inputs, whichever is more. Activations come on top; they depend on the texts.
    """

    model: str
    parameters: int
    blocks: tuple[int, ...]
    matrices: dict[str, tuple[int, int]]
    editor_parameters: int
    model_bytes: int
    editor_bytes: int
    training_bytes: int

    def gpu_bytes(self, count: int) -> int:
        """Return the bytes on each of ``count`` GPUs that share the model's weights; each has a whole editor."""
        return -(-self.model_bytes // count) + self.editor_bytes + self.training_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return {**vars(self), "gpu_bytes": {str(count): self.gpu_bytes(count) for count in GPUS}}


def only_configured(model: str) -> bool:
    """Tell whether ``model`` is a configuration file, or a folder that holds one and no weights."""
    path = Path(model)
    if path.is_dir():
        return (path / "config.json").is_file() and not any(next(path.glob(kind), None) for kind in _WEIGHTS)
    return path.suffix == ".json" and path.is_file()


def dry_run(
    path: str,
    network: MendConfig = PRESETS["default"][0],
    modules: Sequence[str] = (),
    layers: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> ResourceEstimate:
    """Build a model without weights from its configuration, and count parameters and bytes.

    Args:
        path: a ``config.json``, or the folder that holds it.
        network: the editor's settings.
        modules: globs or regular expressions of the matrices to edit.
        layers: the blocks to edit.
        dtype: of the base model's weights.

    Raises:
        ModelError: it is no configuration of a language model, or there is nothing to edit.
    """
    model = skeleton(path)
    chosen = editable_modules(model, modules, network.outputs_only, layers)
    with torch.device("meta"):
        editor = Mend(
            network, ModelFingerprint("", "", {}), {name: dimensions(module) for name, module in chosen.items()}
        )
    trained, parameters = list(editor.parameters()), sum(parameter.numel() for parameter in model.parameters())
    optimizer = 2 * bytes_of(trained) + max(bytes_of([parameter]) for parameter in trained)
    return ResourceEstimate(
        model=path,
        parameters=parameters,
        blocks=tuple(len(stack) for _, stack in find_stacks(model)),
        matrices=dict(editor.shapes),
        editor_parameters=sum(parameter.numel() for parameter in trained),
        model_bytes=parameters * dtype.itemsize,
        editor_bytes=bytes_of([*trained, *editor.buffers()]),
        training_bytes=max(optimizer, editor.calibration_bytes()),
    )
