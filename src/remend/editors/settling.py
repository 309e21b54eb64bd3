"""How strong an edit must be to take on its own prompt.

Some answers are held with more conviction than others, so that one step size is too little for one request and more
than enough, at its neighbours' cost, for another. What an edit needs can be seen without any other prompt: the scale s
at which its target just becomes the model's first choice. A paraphrase, which answers to the edit with about 0.7 of
the prompt's strength, needs more than s; a neighbour, which answers with less than half, bears about 2 s. Between the
strength that training gave (1) and 2 s, the geometric mean was the best on validation data: where they differ, both
err, and in opposite directions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from remend.base import find_modules
from remend.core.branch import branches, frozen
from remend.core.low_rank import LowRank
from remend.tasks.causal_lm import Batch, CausalLM

LARGEST = 8.0
"""An edit that has not taken at this scale does not take by being stronger."""

REFINED = 2
"""Times that the interval in which an edit takes is narrowed."""


@torch.no_grad()
def taking_scales(task: CausalLM, batch: Batch, changes: Mapping[str, LowRank]) -> Float[Tensor, " episode"]:
    """For each edit pair the scale of its change at which the whole target just becomes the first choice.

    Found by false position on the margin: how far the target's least certain token is ahead of its best rival, in
    logits. Edits that never take (up to :data:`LARGEST`) get the scale at which they came nearest; those of what the
    model answers anyway, 1.

    Args:
        task: the unedited model.
        batch: one pair for each episode of ``changes``.
        changes: what the edits do.
    """
    modules = find_modules(task.model, changes)

    def margins(scale: Float[Tensor, " episode"]) -> Float[Tensor, " episode"]:
        scaled = {name: change.scaled(scale[:, None, None]) for name, change in changes.items()}
        with frozen(task.model), branches(modules, scaled):
            return _margins(task.target_logits(batch).float(), batch)

    low = torch.zeros(batch.rows, device=batch.row.device)
    below = margins(low)
    known = below > 0
    high = torch.ones_like(low)
    above = margins(high)
    best, nearest = high.clone(), above.clone()
    while bool((missing := (above <= 0) & (high < LARGEST)).any()):
        low, below = torch.where(missing, high, low), torch.where(missing, above, below)
        high = torch.where(missing, 2 * high, high)
        above = torch.where(missing, margins(high), above)
        nearer = above > nearest
        best, nearest = torch.where(nearer, high, best), torch.where(nearer, above, nearest)
    takes = (above > 0) & ~known
    for _ in range(REFINED):
        middle = _crossing(low, high, below, above)
        found = margins(torch.where(takes, middle, high))
        over = found > 0
        high, above = torch.where(takes & over, middle, high), torch.where(takes & over, found, above)
        low, below = torch.where(takes & ~over, middle, low), torch.where(takes & ~over, found, below)
    scale = torch.where(takes, _crossing(low, high, below, above), best)
    return torch.where(known, torch.ones_like(scale), scale)


def _crossing(low: Tensor, high: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """Where a straight line through both margins is zero."""
    return low + (high - low) * (-below / (above - below).clamp(min=1e-6)).clamp(0, 1)


def _margins(logits: Float[Tensor, "target vocabulary"], batch: Batch) -> Float[Tensor, " episode"]:
    own = logits.gather(1, batch.target[:, None])[:, 0]
    rival = logits.scatter(1, batch.target[:, None], -torch.inf).max(1).values
    none = torch.full((batch.rows,), torch.inf, device=logits.device)
    return none.scatter_reduce(0, batch.row.to(logits.device), own - rival, "amin").to(batch.row.device)
