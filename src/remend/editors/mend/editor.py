"""``Mend``: model editor networks with gradient decomposition (Mitchell et al., ICLR 2022)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from remend.config import Config
from remend.core.distributed import ProcessGroup
from remend.core.editor_gradients import FactoredGradients
from remend.core.low_rank import LowRank
from remend.editors.factor_packing import pack_active
from remend.editors.info import EditorInfo
from remend.editors.mend.calibration import MendCalibration, moments_bytes
from remend.editors.mend.config import MendConfig
from remend.editors.mend.transform import GradientTransform
from remend.editors.strength_search import UneditedPass, scale_to_strength
from remend.editors.trainable import ActivationSource, CalibrationData, EditorMemory
from remend.errors import ConfigError
from remend.models.editable_matrices import editable_modules, encoder_modules
from remend.request import EditRequest
from remend.tasks.base import Example, Task, in_batches

EDIT_SETTINGS = ("settle", "gate", "aggregate")
"""The settings that decide how edits are made of the trained networks' outputs, and so can change after training."""

MendT = TypeVar("MendT", bound="Mend")


class Mend(GradientTransform):
    """MEND: editor networks turn the gradient factors of an edit pair into a low-rank change of each edited matrix."""

    info: ClassVar[EditorInfo] = EditorInfo(
        "mend", "Mitchell et al., ICLR 2022 (arXiv 2110.11309)", "training", batches=True, experts=True
    )
    config_class: ClassVar[type[Config]] = MendConfig
    reads_packed_factors: ClassVar[bool] = True
    calibrates_on_text: ClassVar[bool] = True
    estimates_memory: ClassVar[bool] = True

    # -- create, save and load -----------------------------------------------------------------------------------

    @classmethod
    def select_modules(
        cls, task: Task, config: Any, modules: Sequence[str], layers: str | None
    ) -> dict[str, nn.Module]:
        """Return the matrices to edit; by default the MLPs' of the last three blocks, or their outputs only.

        Raises:
            ModelError: there is nothing to edit, or nothing matches.
            ConfigError: the choice does not go with the configuration.
        """
        selected = editable_modules(task.model, modules, config.outputs_only, layers)
        in_encoder = encoder_modules(task.model, selected)
        if in_encoder and config.tokens == "target":
            raise ConfigError(
                f"{in_encoder[0]} lies in the encoder, where no target is predicted, and these settings edit only "
                "where one is: choose modules of the decoder, or the preset 'paper'"
            )
        return selected

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Move to the model's device."""
        self.to(task.device)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the editor to a folder (safetensors and a JSON manifest), and return the folder.

        ``dtype`` float16 halves it: the matrices are rounded, but never the statistics (the squares of deltas would
        vanish) nor the step sizes.
        """
        return self._write(path, self.saved_tensors(dtype))

    def with_settings(self: MendT, **settings: Any) -> MendT:
        """Return an editor that shares this one's tensors and makes edits with other settings.

        Args:
            settings: values of some of :data:`EDIT_SETTINGS`.

        Raises:
            ConfigError: another setting is named, which the networks were built or trained with, or a value is wrong.
        """
        if wrong := [name for name in settings if name not in EDIT_SETTINGS]:
            raise ConfigError(
                f"{', '.join(wrong)} cannot change, since the networks were built or trained with it; what can is "
                f"{', '.join(EDIT_SETTINGS)}"
            )
        editor = copy.copy(self)
        editor.__dict__["config"] = replace(self.config, **settings)
        return editor

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether the editor was fitted to a model, or trained."""
        counts = (self.network(key).u_statistics.count.sum() for key in self.groups)
        return bool(self.trained) or any(int(count) for count in counts)

    @property
    def uses_negatives(self) -> bool:
        """Whether discriminants are fitted, for which near negatives are needed."""
        return bool(self.config.contrast)

    @property
    def predicting_tokens_only(self) -> bool:
        """Whether only tokens that predict a target take part in an edit."""
        return self.config.tokens == "target"

    def calibrate(self, source: ActivationSource, data: CalibrationData, process_group: ProcessGroup) -> None:
        """Measure whiteners, limits, discriminants, input statistics and units, as configured."""
        MendCalibration(self, source, data, process_group).run()

    def replay_calibration(self, source: ActivationSource, data: CalibrationData, process_group: ProcessGroup) -> None:
        """Look up what :meth:`calibrate` looked up, in the same order."""
        MendCalibration(self, source, data, process_group).replay()

    def episode_changes(
        self, source: ActivationSource, examples: Sequence[Example], factored_gradients: FactoredGradients | None = None
    ) -> dict[str, LowRank]:
        """Return what each edit pair, as an episode of its own, changes."""
        changes: dict[str, LowRank] = self(source.packed_factors(examples), factored_gradients)
        return changes

    def memory(self, ranks: Mapping[str, float]) -> EditorMemory:
        """Return what an episode takes, given the mean number of tokens that carry gradient at each matrix."""
        activations, cached_factors = 0.0, 0.0
        for key, names in self.groups.items():
            network = self.network(key)
            d, rank = network.d_in + network.d_out, network.first.down.shape[0]
            rows = sum(ranks[name] for name in names)
            # When the backward pass begins, ten vectors of the network's width and three of its rank exist for each
            # row, and four of what the network does not read.
            vectors = 10 * network.width + 4 * (d - network.width) + 3 * rank
            activations += 4 * rows * vectors
            cached_factors += 4 * rows * d
        return EditorMemory(activations, cached_factors)

    def calibration_bytes(self) -> int:
        """Return the bytes of the moments of the layers' inputs that are measured before the first step."""
        return moments_bytes(self)

    # -- edit ----------------------------------------------------------------------------------------------------

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Return what all requests change: each is transformed by itself, then they are summed or solved together.

        As ``aggregate`` says (paper, section 3.1; :mod:`remend.core.least_squares`).
        """
        if self.config.aggregate == "sum" or len(requests) == 1:
            return super().combine(task, requests)
        inputs: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        parts = self._changes(task, requests, inputs)
        return {n: self.solve_together(n, [part[n] for part in parts], torch.cat(inputs[n])) for n in self.shapes}

    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Return what each request changes by itself."""
        return self._changes(task, requests)

    def _changes(
        self, task: Task, requests: Sequence[EditRequest], inputs: Mapping[str, list[Tensor]] | None = None
    ) -> list[dict[str, LowRank]]:
        """Return what each request changes by itself; append each matrix's inputs at edited tokens to ``inputs``."""
        examples = [task.encode(request.prompt, request.target) for request in requests]
        changes_of_requests: list[dict[str, LowRank]] = []
        for chunk in in_batches(examples):
            batch = task.collate(chunk)
            unedited = UneditedPass(task, batch, self.shapes)
            active = pack_active(self.capture(task, batch, unedited.loss), self.device)
            for name, collected in (inputs or {}).items():
                collected.append(active[name].u)
            packed = self.whiten_and_clip(active)
            changes = self(packed)
            if self.config.settle:
                counts = {name: matrix.counts for name, matrix in packed.items()}
                changes = scale_to_strength(unedited, changes, self.config.settle, counts)
            for episode in range(len(chunk)):
                changes_of_requests.append(
                    {
                        name: change.single_episode(episode, packed[name].counts[episode])
                        for name, change in changes.items()
                    }
                )
        return changes_of_requests

    def manifest_fields(self) -> dict[str, Any]:
        """Return the rank and the step sizes."""
        return {
            "rank": self.config.rank,
            "alpha": dict(zip(self.shapes, (self.alpha * self.unit).tolist(), strict=True)),
        }
