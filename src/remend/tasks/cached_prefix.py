"""Run a model on the last tokens of its inputs only, with the keys and values of all earlier tokens kept.

In a decoder no token depends on a later one. Where a change begins at some token of each row, what the model computes
for the tokens before it stays the same, however often the change is tried.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from remend.models.frozen_prefix import logits_or_none, same_logits
from remend.tasks.base import Batch, Task

_verified: WeakSet[nn.Module] = WeakSet()
"""The models that gave the same logits with their earlier tokens kept."""


class CachedPrefix:
    """What a decoder keeps of the tokens before a given one of each row.

    Attributes:
        batch: the tokens from that one on, with positions counted from it.
    """

    def __init__(self, batch: Batch, cache: Any) -> None:
        self.batch, self._cache = batch, cache

    @staticmethod
    def of(task: Task, batch: Batch, start: Int[Tensor, " row"]) -> CachedPrefix | None:
        """Run a model on the tokens before ``start``; None where it keeps nothing of them, or cannot go on from it.

        Args:
            task: a decoder.
            batch: its input, padded on the right.
            start: the first token of each row that a change reaches.
        """
        longest = int(start.max())
        keeps = getattr(task, "keeps_tokens", False)
        if not (longest and keeps) or batch.inputs.keys() != {"input_ids", "attention_mask"}:
            return None
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        # The tokens before `start` move to the right end of the prefix, the others to the left end of the rest.
        columns = torch.arange(ids.shape[1] + longest, device=ids.device) - longest + start[:, None]
        inside = (columns >= 0) & (columns < ids.shape[1])
        columns = columns.clamp(0, ids.shape[1] - 1)
        ids, mask = ids.gather(1, columns), mask.gather(1, columns) * inside
        used = int(mask.sum(0).nonzero().max()) + 1
        ids, mask = ids[:, :used], mask[:, :used]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        before = {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}
        after = {"input_ids": ids[:, longest:], "attention_mask": mask}
        if "position_ids" in inspect.signature(task.model.forward).parameters:
            before["position_ids"], after["position_ids"] = positions[:, :longest], positions[:, longest:]
        rest = Batch(after, mask[:, longest:].bool(), batch.row, batch.position - start[batch.row], batch.target)
        cached = _keys_and_values(task.model, before)
        if cached is None:
            return None
        prefix = CachedPrefix(rest, cached)
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


@torch.no_grad()
def _keys_and_values(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Return the model's own cache of some tokens; None where it keeps none."""
    return getattr(model(**inputs, use_cache=True), "past_key_values", None)
