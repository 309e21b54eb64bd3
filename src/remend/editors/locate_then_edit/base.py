"""``LocateThenEdit``: what ROME and MEMIT share. The matrices that they edit, and the covariance of their inputs.

A narrowing MLP matrix W is seen as a memory that answers a key k with a value W k; an edit changes the value at the key
of the request's subject. What other keys are answered is kept as far as the second moment C = E[k kᵀ] of the keys of
ordinary text tells.
"""

from __future__ import annotations

import itertools
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.capture import record_inputs
from remend.core.layers import dimensions
from remend.core.symmetric_operator import pack_symmetric, unpack_symmetric
from remend.core.whitening import SecondMoment
from remend.editors.base import WeightEditor
from remend.editors.input_moments import second_moments
from remend.editors.locate_then_edit.subject_prompts import (
    Located,
    PromptContexts,
    encode_contexts,
    random_beginnings,
)
from remend.editors.saved_editor import SavedEditor
from remend.errors import ConfigError, ModelError
from remend.fingerprint import find_modules
from remend.models.blocks import Blocks, distinct, find_stacks, select_blocks
from remend.models.editable_matrices import is_down_projection, mlp_layer_names
from remend.models.frozen_prefix import run_as_far_as
from remend.request import EditRequest
from remend.tasks.base import Example, Task, in_batches

MAX_KEY_SIZE = 32_768
"""Dimensions of keys up to which C is inverted: 4 GB in float32, 9 in the float64 that its inverse needs."""

PROMPTS_AT_ONCE = 64
"""Prompts that go through the model together."""

TASK_REQUIREMENTS: Mapping[str, str] = {"reads_text": "it looks for the subject of a request in the text of the prompt"}
"""The tasks that have subjects, for :attr:`EditorInfo.requires`."""


class LocateThenEdit(WeightEditor):
    """An editor of narrowing MLP matrices in the middle of the model, at the last token of the request's subject.

    Of an encoder-decoder, the matrices are the encoder's, which reads the prompt.

    Attributes:
        one_block: whether it edits one block only.
        covariances: C of each edited matrix's keys, with a floor that lets it be inverted.
        beginnings: random beginnings, behind each of which prompts are read, too.
    """

    measured_settings: ClassVar[tuple[str, ...] | None] = ("floor", "beginnings")
    one_block: ClassVar[bool] = False
    batch_size: ClassVar[int | None] = None  # how many go together depends on the number of beginnings
    covariances: dict[str, Float[Tensor, "d d"]]
    beginnings: tuple[str, ...]

    @staticmethod
    @abstractmethod
    def default_blocks(count: int) -> list[int]:
        """Return the numbers of the blocks that are edited by default, out of ``count``."""

    @classmethod
    def select_modules(
        cls, task: Task, config: Any, modules: Sequence[str], layers: str | None
    ) -> dict[str, nn.Module]:
        """Return the narrowing matrix of each chosen block's MLP, in the order in which they run.

        Raises:
            ConfigError: a matrix is too wide (:data:`MAX_KEY_SIZE`), or ``layers`` names no block.
            ModelError: a block has no such matrix.
        """
        name, model = cls.info.name, task.model
        selected: dict[str, nn.Module] = {}
        for prefix, block in cls.select_blocks_of_stack(model, layers):
            names = [n for n in mlp_layer_names(prefix, block) if is_down_projection(find_modules(model, [n])[n])]
            if not names:
                raise ModelError(f"{prefix} has no MLP whose narrowing matrix {name} could edit")
            selected |= find_modules(model, names[-1:])
        if wide := [matrix for matrix, module in selected.items() if dimensions(module)[0] > MAX_KEY_SIZE]:
            raise ConfigError(
                f"the keys of {wide[0]} have {dimensions(selected[wide[0]])[0]} dimensions, and {name} inverts their "
                f"second moment, which can be done up to {MAX_KEY_SIZE}: use mend or ridge"
            )
        return selected

    @classmethod
    def select_blocks_of_stack(cls, model: nn.Module, layers: str | None) -> Blocks:
        """Return the blocks to edit: of the first stack, those that ``layers`` names, or the default ones.

        Raises:
            ConfigError: ``layers`` names no block, or several for an editor of one.
        """
        blocks = find_stacks(model)[0][1]
        if layers is None:
            return distinct([blocks[index] for index in cls.default_blocks(len(blocks))])
        prefixes = {prefix for prefix, _ in blocks}
        selected = distinct([(prefix, block) for prefix, block in select_blocks(model, layers) if prefix in prefixes])
        if cls.one_block and len(selected) > 1:
            name = cls.info.name
            raise ConfigError(f"{name} edits one block, and layers {layers!r} names {len(selected)}: name one")
        return selected

    @property
    def key_layers(self) -> list[str]:
        """The layers whose inputs are the keys."""
        return list(self.shapes)

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Measure C over the tokens of the text, and draw the beginnings from it."""
        self.measure(task, text, seed)

    def measure(self, task: Task, text: Sequence[str], seed: int) -> dict[str, SecondMoment]:
        """Set C and the beginnings; return the moments of the keys."""
        examples = task.ordinary_examples(text, seed)
        moments = second_moments(task, find_modules(task.model, self.key_layers), examples)
        for name, moment in moments.items():
            if moment.tokens < (d := self.shapes[name][0]):
                warnings.warn(
                    f"the text has {moment.tokens} tokens and the keys of {name} have {d} dimensions, most of which "
                    "are not seen there: edits may be worse. Give a longer text",
                    stacklevel=4,
                )
                break
        self.covariances = {name: moment.covariance(self.config.floor).cpu() for name, moment in moments.items()}
        # A classifier's own ordinary inputs are no texts that could be written; it reads no beginnings either.
        passages = text or [task.decode(example.input) for example in examples if task.generates]
        self.beginnings = tuple(random_beginnings(passages, self.config.beginnings, seed))
        return moments

    # -- save and load -------------------------------------------------------------------------------------------

    def saved_fields(self) -> dict[str, Any]:
        """Return the beginnings."""
        return {"beginnings": list(self.beginnings)}

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return one half of each covariance."""
        return {f"covariance_{i}": pack_symmetric(self.covariances[name]) for i, name in enumerate(self.key_layers)}

    def restore(self, saved: SavedEditor) -> None:
        """Take over the covariances and the beginnings."""
        self.beginnings = tuple(saved.field("beginnings", list))
        self.covariances = {
            name: unpack_symmetric(saved.tensors[f"covariance_{index}"]) for index, name in enumerate(self.key_layers)
        }
        for name, covariance in self.covariances.items():
            d_in = self.shapes[name][0]
            if covariance.shape != (d_in, d_in):
                raise RuntimeError(f"the covariance of {name} is not of {d_in} dimensions")
        if len(saved.tensors) != len(self.key_layers) or not all(isinstance(text, str) for text in self.beginnings):
            raise RuntimeError("there are more tensors than matrices, or a beginning is no text")

    # -- edit ----------------------------------------------------------------------------------------------------

    def encode(self, task: Task, requests: Sequence[EditRequest]) -> list[PromptContexts]:
        """Return the prompts of the requests, each by itself and behind the beginnings, with its subject located.

        Raises:
            RequestError: a request names no subject that its prompt holds, or does not fit the context.
        """
        # What follows the subject alone shows what the model takes it to be (ROME, Eq. 4).
        return [
            encode_contexts(task, r, self.beginnings, (r.subject,) if task.causal and r.subject else ())
            for r in requests
        ]

    def keys_at(self, task: Task, name: str, located: Sequence[Located]) -> Float[Tensor, "example d_in"]:
        """Return a matrix's input at a token of each example; blocks above it do not run."""
        module = find_modules(task.model, [name])
        positions = iter(position for _, position in located)
        keys: list[Tensor] = []
        for part in in_batches([example for example, _ in located]):
            batch = task.collate(part)
            run = partial(run_as_far_as, task.model, module.values(), partial(task.outputs, batch))
            recorded = record_inputs(task.model, module, batch.rows, run)[name]
            at = torch.tensor([next(positions) for _ in part], device=batch.row.device)
            keys += recorded.at_tokens(at, batch.inputs["input_ids"].shape[1])[0][:, 0]
        return torch.stack(keys).float()

    def token_keys(self, task: Task, name: str, examples: Sequence[Example]) -> Float[Tensor, "token d_in"]:
        """Return a matrix's input at every token of some texts; blocks above it do not run."""
        module = find_modules(task.model, [name])
        keys: list[Tensor] = []
        for part in in_batches(examples):
            batch = task.collate(part)
            run = partial(run_as_far_as, task.model, module.values(), partial(task.outputs, batch))
            recorded = record_inputs(task.model, module, batch.rows, run)[name]
            rows, length = batch.mask.shape
            x = recorded.x.view(rows, length, -1, recorded.x.shape[-1])[:, :, 0]  # the slot of one expert is enough
            keys.append(x[batch.mask.to(x.device)].float())
        return torch.cat(keys)

    def block_of(self, task: Task, name: str) -> nn.Module:
        """Return the block in which an edited matrix lies."""
        return next(block for prefix, block in find_stacks(task.model)[0][1] if name.startswith(f"{prefix}."))

    @torch.no_grad()
    def whiten_keys(self, name: str, keys: Float[Tensor, "request d_in"]) -> Float[Tensor, "request d_in"]:
        """Return C⁻¹k of each key, in float64: C's smallest eigenvalues are a small part of its largest."""
        cached: dict[str, Tensor] = self.__dict__.setdefault("_cholesky", {})
        if name not in cached:  # cubic in the width, and the same for every edit
            cached[name] = torch.linalg.cholesky(self.covariances[name].double())
        return torch.cholesky_solve(keys.double().cpu().mT, cached[name]).mT


def in_prompt_batches(contexts: Sequence[PromptContexts]) -> Iterator[Sequence[PromptContexts]]:
    """Split requests into parts of about :data:`PROMPTS_AT_ONCE` prompts, within which each has as many prompts."""
    for _, group in itertools.groupby(contexts, key=lambda of_request: of_request.shape):
        alike = list(group)
        size = max(1, PROMPTS_AT_ONCE // sum(alike[0].shape))
        for start in range(0, len(alike), size):
            yield alike[start : start + size]
