"""``Fit``: the training-free editor. A value is fitted to a set of prompts, and acts where the subject's key is read.

Where: at the subject's last token, in a block before the middle of the model. There a model has heard whom a prompt is
about, and not yet what it will say: keys of other subjects are far from the edit's own, also where they have the same
answer. What: one value, by a few steps of Adam on the request's own prompt, its given paraphrases and random beginnings
before them, while what the model says to other prompts about the subject should stay.

How it acts: by default as one hidden unit more in the block's MLP, as in Transformer-Patcher (Huang et al., ICLR 2023,
arXiv 2301.09785), whose direction is whitened by ordinary text as in ROME. A linear change of a weight answers every
other input with about 1/√d of its own answer; a unit with a threshold does not answer them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor, nn

from remend.config import Config, Factor
from remend.core.low_rank import LowRank
from remend.core.response import LINEAR, Response
from remend.editors.info import EditorInfo
from remend.editors.locate_then_edit.base import TASK_REQUIREMENTS, LocateThenEdit, in_prompt_batches
from remend.editors.locate_then_edit.same_subject_prompts import QUESTIONS, STATEMENTS
from remend.editors.locate_then_edit.subject_finder import find_subject
from remend.editors.locate_then_edit.subject_prompts import PromptContexts, encode_contexts, join_contexts
from remend.editors.locate_then_edit.value_optimization import LocateConfig, SubjectBatch, optimize_values
from remend.editors.saved_editor import SavedEditor
from remend.errors import ConfigError
from remend.fingerprint import find_modules
from remend.models.editable_matrices import block_mlp
from remend.models.frozen_prefix import FrozenPrefix
from remend.request import Chat, EditRequest
from remend.tasks.base import Task

SUM_RIDGE = 0.01
"""λ of the system that the values of several edits solve together: two spellings of a subject have one key."""


@dataclass(frozen=True)
class FitConfig(LocateConfig):
    """Settings of the editor; chosen on validation requests about real facts (benchmarks/real.py).

    Attributes:
        kind: what the edit is made of: a hidden unit more in the MLP (``units``), or a change of its narrowing matrix
            (``low-rank``), which can be exported as a LoRA adapter.
        threshold: a unit answers inputs whose q is above this, with the edit's own key at 1.
        beta: the sharpness of a unit.
    """

    steps: int = 40
    enough: float = 0.15
    kl_weight: float = 0.5
    largest: float = 4.0
    beginnings: int = 4
    kind: Literal["units", "low-rank"] = "units"
    threshold: Factor = 0.4
    beta: PositiveFloat = 20.0


class Fit(LocateThenEdit):
    """The training-free editor: by default one hidden unit in one MLP for each subject.

    Attributes:
        constant: the direction w with w·x ≈ 1 for every input x of the MLP, by which a unit gets its threshold.
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "fit",
        "this package, after ROME (arXiv 2202.05262) and Transformer-Patcher (arXiv 2301.09785)",
        "nothing",
        batches=True,
        options=("text", "layers"),
        requires=TASK_REQUIREMENTS,
    )
    config_class: ClassVar[type[Config]] = FitConfig
    one_block: ClassVar[bool] = True
    constant: Float[Tensor, " d_in"]

    @staticmethod
    def default_blocks(count: int) -> list[int]:
        """Return the block at a fifth of the depth: number 6 of 30."""
        return [max(0, min(round(0.2 * count), count - 2))]

    @classmethod
    def select_modules(
        cls, task: Task, config: Any, modules: Sequence[str], layers: str | None
    ) -> dict[str, nn.Module]:
        """Return the layers of one block's MLP that an edit reads and changes: the second one may be the first.

        Raises:
            ModelError: the block has no MLP that can be edited so.
        """
        if config.kind == "low-rank":
            return super().select_modules(task, config, modules, layers)
        ((block, _),) = cls.select_blocks_of_stack(task.model, layers)
        mlp = block_mlp(task.model, block)
        return find_modules(task.model, [mlp.reads, mlp.down])

    @property
    def key_layer(self) -> str:
        """The layer whose input an edit reads."""
        return next(iter(self.shapes))

    @property
    def changed_layer(self) -> str:
        """The layer to whose output an edit adds."""
        return list(self.shapes)[-1]

    @property
    def key_layers(self) -> list[str]:
        """The layers whose inputs are measured."""
        return [self.key_layer]

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Measure the inputs of the MLP on the text, or on what the model writes itself, and draw the beginnings."""
        moment = self.measure(task, text, seed)[self.key_layer]
        covariance = self.covariances[self.key_layer].double()
        # Least squares: E[(w·x − 1)²] is least at w = C⁻¹ E[x].
        self.constant = torch.linalg.solve(covariance, moment.mean().to(covariance)).float()

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return what the editor measured."""
        return {**super().saved_tensors(), "constant": self.constant}

    def restore(self, saved: SavedEditor) -> None:
        """Take over what the editor measured."""
        tensors = dict(saved.tensors)
        self.constant = tensors.pop("constant")
        super().restore(replace(saved, tensors=tensors))
        if self.constant.shape != (self.shapes[self.key_layer][0],):
            raise RuntimeError("the constant direction does not fit the layer")

    # -- edit ----------------------------------------------------------------------------------------------------

    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Return what each request changes by itself."""
        contexts = self.encode(task, requests)
        _, u, values = self._fit(task, contexts)
        return [self._change(task, u[i : i + 1], values[i : i + 1]) for i in range(len(contexts))]

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Return what all requests change together: those about one subject share a value."""
        by_subject: dict[str, list[PromptContexts]] = {}
        subjects = [self._with_subject(task, request).key for request in requests]
        for subject, contexts in zip(subjects, self.encode(task, requests), strict=True):
            by_subject.setdefault(subject, []).append(contexts)
        keys, u, values = self._fit(task, [join_contexts(parts) for parts in by_subject.values()])
        # Each value acts at the keys of the other subjects, too, as far as their units answer there.
        answers = self._response(task)(keys @ u.mT)
        system = answers + SUM_RIDGE * torch.eye(len(keys), device=keys.device)
        return self._change(task, u, torch.linalg.solve(system, (1 + SUM_RIDGE) * values))

    def encode(self, task: Task, requests: Sequence[EditRequest]) -> list[PromptContexts]:
        """Return the prompts that each request is fitted to, and those about its subject that should stay."""
        return [
            encode_contexts(task, self._with_subject(task, request), self.beginnings, _kept_prompts(task, request))
            for request in requests
        ]

    def _with_subject(self, task: Task, request: EditRequest) -> EditRequest:
        """Return the request with a subject: its own, or the one found in its prompt."""
        if (request.subject or "").strip():
            return request
        return request.model_copy(update={"subject": find_subject(task, request.prompt)})

    def _fit(self, task: Task, contexts: Sequence[PromptContexts]) -> tuple[Tensor, Tensor, Tensor]:
        """Return each subject's key, the direction that answers to it with 1, and the value to add there."""
        modules, response = self.edited_modules(task), self._response(task)
        prefix = FrozenPrefix(task.model, self.shapes)
        block = self.block_of(task, self.changed_layer)
        order = sorted(range(len(contexts)), key=lambda index: contexts[index].shape)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in in_prompt_batches([contexts[index] for index in order]):
            batch = SubjectBatch(task, part, prefix, from_subject=True)
            rows = batch.keys_of_rows(self.key_layer, modules[self.key_layer])
            by_subject = rows.view(batch.requests, batch.rows_per_request, -1).float()
            keys = by_subject[:, : batch.rows_with_target].mean(1)
            u = self._directions(keys)
            answers = response((by_subject * u[:, None]).sum(-1)).flatten()
            values = optimize_values(batch, modules[self.changed_layer], block, self.config, answers)
            parts.append((keys, u, values))
        keys, u, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        place = torch.tensor(order, device=keys.device).argsort()
        return keys[place], u[place], values[place]

    def _directions(self, keys: Float[Tensor, "subject d_in"]) -> Float[Tensor, "subject d_in"]:
        """Return ũ of each key k, with ũ·k = 1: C⁻¹k, and below the threshold in the direction away from it.

        A unit without a bias gets its threshold θ from the direction w with w·x ≈ 1: ũ = (u − θw) / (1 − θ).
        """
        whitened = self.whiten_keys(self.key_layer, keys)
        u = whitened / (keys.to(whitened) * whitened).sum(1, keepdim=True)
        if self.config.kind == "units":
            w = self.constant.to(u)
            u = (u - self.config.threshold * w) / (1 - self.config.threshold * keys.to(w) @ w)[:, None]
        return u.to(keys)

    def _response(self, task: Task) -> Response:
        """Return how the edit's factor pairs answer."""
        if self.config.kind == "low-rank":
            return LINEAR
        block = self.block_of(task, self.changed_layer)
        name = next(name for name, module in task.model.named_modules() if module is block)
        return block_mlp(task.model, name).response(self.config.beta)

    def _change(
        self, task: Task, u: Float[Tensor, "subject d_in"], values: Float[Tensor, "subject d_out"]
    ) -> dict[str, LowRank]:
        """Return the change of these factor pairs."""
        reads = self.key_layer if self.config.kind == "units" else ""
        return {self.changed_layer: LowRank(u, values.to(u), self._response(task), reads=reads)}


def _kept_prompts(task: Task, request: EditRequest) -> Sequence[str]:
    """Return what is asked of a request's subject beside the request itself, as templates; none of a classifier."""
    if not task.generates:
        return ()
    return STATEMENTS if task.causal and not isinstance(request.prompt, Chat) else QUESTIONS
