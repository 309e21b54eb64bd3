"""Run a model on the last tokens of its inputs only, with the keys and values of all earlier tokens kept.

In a decoder no token depends on a later one. Where a change begins at some token of each text, what the model computes
for the tokens before it stays the same, however often the change is tried.

Texts share rows, one behind the other, so that none is padded to the length of the longest: a mask lets each token read
its own text only.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from remend.models.frozen_prefix import logits_or_none, same_logits
from remend.tasks.base import Batch, Task

ROW_TOKENS = 500
"""Kept tokens of texts that share a row, at most: attention is quadratic in them."""

_verified: WeakSet[nn.Module] = WeakSet()
"""The models that gave the same logits with their earlier tokens kept."""


class CachedPrefix:
    """What a decoder keeps of the tokens before a given one of each text.

    Attributes:
        batch: the tokens from that one on, several texts in a row.
        row: the row of each text.
        position: the position of that token in it.
        text_of_token: the text of each token; −1 of padding.
    """

    def __init__(
        self, batch: Batch, row: Tensor, position: Tensor, text_of_token: Int[Tensor, "row token"], cache: Any
    ) -> None:
        self.batch, self._cache = batch, cache
        self.row, self.position, self.text_of_token = row, position, text_of_token

    @staticmethod
    def of(task: Task, batch: Batch, start: Int[Tensor, " text"]) -> CachedPrefix | None:
        """Run a model on the tokens before ``start``; None where it keeps nothing of them, or cannot go on from it.

        Args:
            task: a decoder.
            batch: its input, a row for each text, padded on the right.
            start: the first token of each text that a change reaches.
        """
        reads_positions = "position_ids" in inspect.signature(task.model.forward).parameters
        if not (start.any() and reads_positions and getattr(task, "keeps_tokens", False)):
            return None
        if batch.inputs.keys() != {"input_ids", "attention_mask"}:
            return None
        starts, ends = start.tolist(), batch.mask.sum(1).tolist()
        texts = list(zip(batch.inputs["input_ids"].cpu(), starts, ends, strict=True))
        # Layers with a sliding window keep one token less than they read.
        window = getattr(task.model.config.get_text_config(), "sliding_window", None) or ROW_TOKENS + 1
        rows = list(_share_rows(starts, min(ROW_TOKENS, window - 1)))
        before = _Tokens.of([[(i, texts[i][0][:start], 0) for i, start in row] for row in rows])
        after = _Tokens.of([[(i, texts[i][0][start : texts[i][2]], start) for i, start in row] for row in rows])
        cached = _keys_and_values(task.model, before.inputs(task, before))
        if cached is None:
            return None
        row, position = after.first_of_texts(len(texts))
        text = batch.row.cpu()
        rest = Batch(
            after.inputs(task, before.followed_by(after)),
            (after.text >= 0).to(task.device),
            row[text].to(task.device),
            (position[text] + batch.position.cpu() - start.cpu()[text]).to(task.device),
            batch.target,
        )
        prefix = CachedPrefix(rest, row.to(task.device), position.to(task.device), after.text.to(task.device), cached)
        return prefix if task.model in _verified or prefix._verify(task, batch) else None

    def outputs(self, task: Task) -> Float[Tensor, "target output"]:
        """Run the model on the remaining tokens; return the outputs that predict the targets."""
        # The model adds the remaining tokens to the cache that it is given.
        inputs: dict[str, Any] = {**self.batch.inputs, "past_key_values": copy.deepcopy(self._cache)}
        return task.outputs(replace(self.batch, inputs=inputs))

    @torch.no_grad()
    def _verify(self, task: Task, batch: Batch) -> bool:
        """Return whether the outputs are those of a pass over all tokens; a model is tried once."""
        outputs = logits_or_none(lambda: self.outputs(task))
        if outputs is None or not same_logits(outputs, task.outputs(batch).float()):
            return False
        _verified.add(task.model)
        return True


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Tokens of texts that share rows: their ids, the text of each (−1: none), and its position in it."""

    ids: Int[Tensor, "row token"]
    text: Int[Tensor, "row token"]
    position: Int[Tensor, "row token"]

    @staticmethod
    def of(rows: Sequence[Sequence[tuple[int, Int[Tensor, " token"], int]]]) -> _Tokens:
        """Put parts of texts one behind the other: each one's number, its tokens and the position of the first."""
        width = max(sum(len(ids) for _, ids, _ in row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        text, position = torch.full_like(ids, -1), torch.zeros_like(ids)
        for number, row in enumerate(rows):
            at = 0
            for index, part, first in row:
                place = (number, slice(at, at + len(part)))
                ids[place], text[place] = part, index
                position[place] = torch.arange(first, first + len(part))
                at += len(part)
        return _Tokens(ids, text, position)

    def followed_by(self, other: _Tokens) -> _Tokens:
        """Return the tokens of both."""
        pairs = ((self.ids, other.ids), (self.text, other.text), (self.position, other.position))
        return _Tokens(*(torch.cat(pair, dim=1) for pair in pairs))

    def first_of_texts(self, count: int) -> tuple[Int[Tensor, " text"], Int[Tensor, " text"]]:
        """Return the row of each text's first token, and its place there."""
        places = [(self.text == index).nonzero()[0] for index in range(count)]
        row, place = torch.stack(places).unbind(1)
        return row, place

    def inputs(self, task: Task, read: _Tokens) -> dict[str, Tensor]:
        """Return the inputs of a pass over these tokens, each of which reads ``read`` as far as it is of its text."""
        reads: Bool[Tensor, "row token read"] = (self.text[:, :, None] == read.text[:, None]) & (
            self.position[:, :, None] >= read.position[:, None]
        )
        dtype = next(task.model.parameters()).dtype
        mask = torch.zeros(reads.shape, dtype=dtype).masked_fill(~reads, torch.finfo(dtype).min)[:, None]
        inputs = {"input_ids": self.ids, "attention_mask": mask, "position_ids": self.position}
        return {name: tensor.to(task.device) for name, tensor in inputs.items()}


def _share_rows(starts: Sequence[int], room: int) -> Iterator[list[tuple[int, int]]]:
    """Split texts, given how many tokens of each are kept, among rows of at most ``room``, unless one has more."""
    row: list[tuple[int, int]] = []
    for index, start in enumerate(starts):
        if row and start + sum(kept for _, kept in row) > room:
            yield row
            row = []
        row.append((index, start))
    yield row


@torch.no_grad()
def _keys_and_values(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Return the model's own cache of some tokens; None where it keeps none."""
    # The logits of these tokens are not needed: with a large vocabulary they would take a third of the pass.
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return getattr(model(**inputs, **few, use_cache=True), "past_key_values", None)
