"""``Mend``: model editor networks with gradient decomposition (Mitchell et al., ICLR 2022)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.assets import ATLAS, ATLAS_FOLDER
from remend.config import Config, from_json
from remend.core.distributed import ProcessGroup
from remend.core.factored_gradients import FactoredGradients
from remend.core.least_squares import least_squares, make_definite
from remend.core.low_rank import LowRank, concatenate
from remend.core.operators import pack_symmetric, unpack_symmetric
from remend.editors.info import EditorInfo
from remend.editors.mend.calibration import MendCalibration, moments_bytes
from remend.editors.mend.config import MendConfig
from remend.editors.mend.transform import GradientTransform
from remend.editors.packing import pack_active
from remend.editors.serialization import SavedEditor, read_editor, sketched_directions, symmetric_tensors
from remend.editors.strength_search import UneditedPass, scale_to_strength
from remend.editors.trainable import ActivationSource, CalibrationData, EditorMemory
from remend.errors import ConfigError, FileError
from remend.models.blocks import find_stacks
from remend.models.structure import editable_modules
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
        stacks = [name for name, _ in find_stacks(task.model)[:-1]]
        of_encoder = [name for stack in stacks for name in selected if name.startswith(f"{stack}.")]
        if of_encoder and config.tokens == "target":
            raise ConfigError(
                f"{of_encoder[0]} lies in the encoder, where no target is predicted, and these settings edit only "
                "where one is: choose modules of the decoder, or the preset 'paper'"
            )
        return selected

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Move to the model's device."""
        self.to(task.device)

    @classmethod
    def load(cls: type[MendT], path: str | Path) -> MendT:
        """Read an editor that :meth:`save` wrote; ``atlas`` is the one that ships with remend.

        Raises:
            FileError: the folder is missing, damaged, altered, of an unknown version, or of another editor.
        """
        path = ATLAS_FOLDER / "editor" if path == ATLAS else path
        saved = read_editor(path, cls.info.name)
        # On "meta" nothing is allocated or initialized before load_state_dict assigns the saved tensors.
        with torch.device("meta"):
            directions = sketched_directions(saved.shapes, saved.tensors)
            editor = cls(from_json(MendConfig, saved.config), saved.base, saved.shapes, directions)
        try:
            editor.restore(saved)
        except RuntimeError as error:
            raise FileError(f"{path}: the tensors do not fit the configuration ({error}); it was altered") from None
        return editor

    def restore(self, saved: SavedEditor) -> None:
        """Take over parameters, buffers and what training recorded."""
        # Stored as float16 where size matters; the editor always computes in float32.
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in saved.tensors.items()}
        packed = symmetric_tensors(self.state_dict()) & tensors.keys()
        tensors |= {name: unpack_symmetric(tensors[name]) for name in packed}
        self.load_state_dict(tensors, assign=True)
        self.trained = saved.field("trained", dict)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the editor to a folder (safetensors and a JSON manifest), and return the folder.

        ``dtype`` float16 halves it: the matrices are rounded, but never the statistics (the squares of deltas would
        vanish) nor the step sizes.
        """
        return self._write(path, self.saved_tensors(dtype))

    def saved_tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return parameters and buffers, the matrices in ``dtype``; of symmetric matrices, one half."""
        state = self.state_dict()
        tensors = {name: t.to(dtype) if t.dim() == 2 and "statistics" not in name else t for name, t in state.items()}
        return tensors | {name: pack_symmetric(tensors[name]) for name in symmetric_tensors(state)}

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
        return {n: self._solve(n, [part[n] for part in parts], torch.cat(inputs[n])) for n in self.shapes}

    @torch.no_grad()
    def _solve(self, name: str, parts: Sequence[LowRank], inputs: Float[Tensor, "row d_in"]) -> LowRank:
        """Return a change that changes the output at each request's ``inputs`` as its part does by itself."""
        inputs_of_parts = inputs.split([part.rank for part in parts])
        pairs = zip(parts, inputs_of_parts, strict=True)
        output_changes = torch.cat([part.output_change(rows, part.experts) for part, rows in pairs])
        discriminant = self.operator("contrast", name)
        metric = None if discriminant is None else make_definite(discriminant)
        joined = concatenate(parts)
        change = least_squares(
            self.whiten(inputs, name), output_changes, metric, gate=joined.gate, experts=joined.experts
        )
        return replace(change, u=self.whiten(change.u, name))

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
