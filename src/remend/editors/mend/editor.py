"""MEND: model editor networks with gradient decomposition (Mitchell et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.assets import ATLAS, ATLAS_FOLDER
from remend.config import Config, from_json
from remend.core.capture import GradientFactors, capture_gradient_factors
from remend.core.editor_network import EditorNetwork
from remend.core.factored_gradients import FactoredGradients
from remend.core.least_squares import least_squares, make_definite
from remend.core.low_rank import LowRank, concatenate
from remend.core.operators import SymmetricOperator, pack_symmetric, unpack_symmetric
from remend.core.sketching import sketch_directions
from remend.editors.base import WeightEditor
from remend.editors.info import EditorInfo
from remend.editors.mend.config import MendConfig
from remend.editors.mend.networks import grouped, new_network
from remend.editors.packing import PackedFactors, Table, active_rows
from remend.editors.serialization import SavedEditor, read_editor, sketched_directions, symmetric_tensors
from remend.editors.strength_search import UneditedPass, settled
from remend.errors import ConfigError, FileError
from remend.fingerprint import ModelFingerprint, find_modules
from remend.models.blocks import find_stacks
from remend.models.structure import editable_modules
from remend.request import EditRequest
from remend.tasks.base import Batch, Task, in_batches

LEAST_ANSWER = 0.2
"""Contrast scales ũ by 1 / (u·ũ), but by no more than if u·ũ were this; its mean over the training prompts is 1."""

MendT = TypeVar("MendT", bound="Mend")


class Mend(nn.Module, WeightEditor):
    """The editor: one network for each weight shape (or matrix), one step size α for each edited matrix.

    Attributes:
        config: its settings.
        base: the model it is for.
        shapes: (d_in, d_out) of each edited module, by name.
        groups: the modules of each shape, which share a network; each module by itself without sharing.
        directions: in how many directions inputs are whitened and contrasted, by name, where not in all.
        unit: what α counts in, for each matrix; 1 unless step sizes are relative.
        largest: the size to which each matrix's gradients are limited, if they are.
        trained: what its training recorded (settings, steps, seconds, validation history); empty before.
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "mend", "Mitchell et al., ICLR 2022 (arXiv 2110.11309)", "training", batches=True, experts=True
    )
    config_class: ClassVar[type[Config]] = MendConfig
    unit: Float[Tensor, " matrix"]
    largest: Float[Tensor, " matrix"] | None

    def __init__(
        self,
        config: MendConfig,
        base: ModelFingerprint,
        shapes: Mapping[str, tuple[int, int]],
        directions: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.base = base
        self.shapes = dict(shapes)
        if directions is None:
            found = {name: sketch_directions(d_in) for name, (d_in, _) in shapes.items() if config.ridge}
            directions = {name: k for name, k in found.items() if k}
        self.directions = dict(directions)
        self.trained: dict[str, Any] = {}
        self.groups = grouped(self.shapes, config.share)
        self.networks = nn.ModuleDict(
            {key: new_network(config, *self.shapes[names[0]], len(names)) for key, names in self.groups.items()}
        )
        self.alpha = nn.Parameter(torch.full((len(self.shapes),), config.alpha))
        self.register_buffer("unit", torch.ones(len(self.shapes)))
        self.register_buffer("largest", torch.full((len(self.shapes),), torch.inf) if config.limit else None)
        for index, (name, (d_in, _)) in enumerate(self.shapes.items()):
            k = self.directions.get(name)  # the parts of a Symmetric operator each
            whitener = torch.ones(k + 1) if k else torch.eye(d_in)
            self.register_buffer(f"basis_{index}", torch.eye(d_in, k) if k else None)
            self.register_buffer(f"whitener_{index}", whitener if config.ridge else None)
            self.register_buffer(f"contrast_{index}", torch.eye(k + 1 if k else d_in) if config.contrast else None)

    # -- making and keeping --------------------------------------------------------------------------------------

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

    def saved_fields(self) -> dict[str, Any]:
        """Return what training recorded."""
        return {"trained": self.trained}

    def saved_tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return parameters and buffers, the matrices in ``dtype``; of symmetric matrices, one half."""
        state = self.state_dict()
        tensors = {name: t.to(dtype) if t.dim() == 2 and "statistics" not in name else t for name, t in state.items()}
        return tensors | {name: pack_symmetric(tensors[name]) for name in symmetric_tensors(state)}

    # -- the method ----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the editor's parameters are."""
        return self.alpha.device

    @property
    def fitted(self) -> bool:
        """Whether it was fitted to a model, or trained."""
        seen = (self.network(key).u_statistics.count.sum() for key in self.groups)
        return bool(self.trained) or any(int(count) for count in seen)

    def capture(
        self, task: Task, batch: Batch, loss: Callable[[], Float[Tensor, " episode"]] | None = None
    ) -> dict[str, GradientFactors]:
        """The gradient factors of each pair's loss in the unedited model (paper, Alg. 2, lines 1–2).

        ``loss`` computes the pairs' losses, if there is more to do in the same pass.
        """
        modules = find_modules(task.model, self.shapes)
        tokens = task.token_masks(batch, self.shapes, self.config.tokens == "target")
        return capture_gradient_factors(task.model, modules, tokens, loss or (lambda: task.loss(batch)))[1]

    def whiten(self, u: Float[Tensor, "row d_in"], name: str) -> Float[Tensor, "row d_in"]:
        """Inputs of a matrix in its whitened coordinates, or, the operator being symmetric, ũ back from there."""
        whitener = self.operator("whitener", name)
        return u if whitener is None else whitener(u)

    def operator(self, kind: str, name: str) -> SymmetricOperator | None:
        """The ``whitener`` of a matrix, or its ``contrast``, if the editor has one."""
        inner, basis = (getattr(self, f"{part}_{self.place(name)}") for part in (kind, "basis"))
        return None if inner is None else SymmetricOperator(inner, basis)

    def keep_operator(self, kind: str, name: str, operator: SymmetricOperator) -> None:
        """Replace it by a measured one."""
        for part, value in ((kind, operator.inner), ("basis", operator.basis)):
            setattr(self, f"{part}_{self.place(name)}", value)

    def place(self, name: str) -> int:
        """The number of an edited matrix."""
        return list(self.shapes).index(name)

    def rows(self, factors: Mapping[str, GradientFactors]) -> dict[str, PackedFactors]:
        """What the networks read: inputs and deltas of the active tokens, :meth:`prepared`, on the editor's device."""
        return self.prepared(active_rows(factors, self.device))

    def prepared(self, rows: Mapping[str, PackedFactors]) -> dict[str, PackedFactors]:
        """Active tokens with their inputs whitened and their gradients limited, if the editor does so."""
        found = {name: replace(own, u=self.whiten(own.u, name)) for name, own in rows.items()}
        if self.largest is None:
            return found
        return {name: own.limited(self.largest[self.place(name)]) for name, own in found.items()}

    def forward(self, rows: Mapping[str, PackedFactors], ledger: FactoredGradients | None = None) -> dict[str, LowRank]:
        """The change of each matrix for each episode: ΔW_ℓ = −α_ℓ Σ_j δ̃_j ũ_jᵀ (Eq. 2), as a batched ``LowRank``.

        Only active tokens go through the networks; those of all matrices of one shape go through together. With a
        ``ledger``, the gradients of the networks' matrices go there as factors.
        """
        changes: dict[str, LowRank] = {}
        steps = dict(zip(self.shapes, self.alpha * self.unit, strict=True))
        for name, (u, delta) in self.transform(rows, ledger).items():
            table = Table(rows[name].counts, self.device)
            whose = rows[name].experts
            experts = None if whose is None else table(whose[:, None])[..., 0]
            u, delta = table(self.whiten(u, name)), table(delta * -steps[name])
            changes[name] = LowRank(u, delta, self.config.gate, experts)
        return {name: changes[name] for name in self.shapes}

    def transform(
        self, rows: Mapping[str, PackedFactors], ledger: FactoredGradients | None = None
    ) -> dict[str, tuple[Float[Tensor, "_row d_in"], Float[Tensor, "_row d_out"]]]:
        """ũ (in whitened coordinates) and δ̃ of each matrix's tokens."""
        found = {}
        for key, names in self.groups.items():
            pseudo = self.network(key)([rows[name].u for name in names], [rows[name].delta for name in names], ledger)
            for matrix, (name, (u, delta)) in enumerate(zip(names, pseudo, strict=True)):
                found[name] = (self._aimed(u, rows[name].u, key, matrix) if self.config.contrast else u), delta
        return found

    def _aimed(
        self, pseudo: Float[Tensor, "row d_in"], u: Float[Tensor, "row d_in"], key: str, matrix: int
    ) -> Float[Tensor, "row d_in"]:
        """ũ, out of the network's normalised units, turned by contrast and scaled to u·ũ = 1."""
        contrast = self.operator("contrast", self.groups[key][matrix])
        assert contrast is not None
        aimed = contrast(self.network(key).denormalize_u(pseudo, matrix))
        found: Tensor = aimed / (aimed * u).sum(1, keepdim=True).clamp(min=LEAST_ANSWER)
        return found

    def network(self, key: str) -> EditorNetwork:
        """The network of a key of :attr:`groups`."""
        network = self.networks[key]
        assert isinstance(network, EditorNetwork)
        return network

    # -- editing -------------------------------------------------------------------------------------------------

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Return what all requests change: their own changes, summed or solved for together.

        As ``aggregate`` says (paper, section 3.1; :mod:`remend.core.least_squares`).
        """
        if self.config.aggregate == "sum" or len(requests) == 1:
            return super().combine(task, requests)
        inputs: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        parts = self._changes(task, requests, inputs)
        return {n: self._solved(n, [part[n] for part in parts], torch.cat(inputs[n])) for n in self.shapes}

    @torch.no_grad()
    def _solved(self, name: str, parts: Sequence[LowRank], inputs: Float[Tensor, "row d_in"]) -> LowRank:
        """What moves the output at each request's ``inputs`` as its own part does by itself."""
        own = inputs.split([part.rank for part in parts])
        moves = torch.cat([part.output_change(rows, part.experts) for part, rows in zip(parts, own, strict=True)])
        contrast = self.operator("contrast", name)
        metric = None if contrast is None else make_definite(contrast)
        whose = concatenate(parts)
        found = least_squares(self.whiten(inputs, name), moves, metric, gate=whose.gate, experts=whose.experts)
        return replace(found, u=self.whiten(found.u, name))

    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Return what each request changes by itself."""
        return self._changes(task, requests)

    def _changes(
        self, task: Task, requests: Sequence[EditRequest], inputs: Mapping[str, list[Tensor]] | None = None
    ) -> list[dict[str, LowRank]]:
        """The changes that each request makes by itself; each matrix's inputs there are added to ``inputs``."""
        pairs = [task.encode(request.prompt, request.target) for request in requests]
        found: list[dict[str, LowRank]] = []
        for chunk in in_batches(pairs):
            batch = task.collate(chunk)
            unedited = UneditedPass(task, batch, self.shapes)
            read = active_rows(self.capture(task, batch, unedited.loss), self.device)
            for name, into in (inputs or {}).items():
                into.append(read[name].u)
            rows = self.prepared(read)
            changes = self(rows)
            if self.config.settle:
                counts = {name: own.counts for name, own in rows.items()}
                changes = settled(unedited, changes, self.config.settle, counts)
            for e in range(len(chunk)):
                found.append({name: change.single_episode(e, rows[name].counts[e]) for name, change in changes.items()})
        return found

    def manifest_fields(self) -> dict[str, Any]:
        """Return the rank and the step sizes."""
        return {
            "rank": self.config.rank,
            "alpha": dict(zip(self.shapes, (self.alpha * self.unit).tolist(), strict=True)),
        }
