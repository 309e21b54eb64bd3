"""How strong an edit must be to take on its own prompt.

Some answers are held with more conviction than others, so that one step size is too little for one request and more
than enough, at its neighbours' cost, for another. What an edit needs can be seen without any other prompt: the scale s
at which the first token of its target just becomes the model's first choice there. A paraphrase answers to the edit
with less than the prompt, and needs more than s; a neighbour answers with less still, and bears a multiple of it. The
strength is set half-way, in ratio, between the one that training gave (1) and such a multiple: where they differ, both
err, and in opposite directions. ``benchmarks/frontier.py`` measures editors with and without it.

What the edit does at later tokens of the target is left as it is: a neighbour's answer is lost at its first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.hooks import changes_applied, frozen
from remend.core.losses import target_loss
from remend.core.low_rank import LowRank
from remend.fingerprint import find_modules
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.base import Batch, Task

LARGEST = 8.0
"""An edit that has not taken at this scale does not take by being stronger."""

REFINED = 2
"""Times that the interval in which an edit takes is narrowed: enough for a strength that is right within a quarter.

False position comes from above, so what is left of the error makes edits stronger; on the atlas by a tenth.
"""


class UneditedPass:
    """The unedited model's pass over a batch of edit pairs, kept for passes of the edited one.

    Args:
        task: the model.
        batch: the edit pairs.
        edited: the names of the matrices that edits change.
        whole: whether all tokens of a target must be the model's first choice for an edit to take, or the first one.
    """

    def __init__(self, task: Task, batch: Batch, edited: Iterable[str], whole: bool = False) -> None:
        self.task, self.batch, self.whole = task, batch, whole
        self.prefix = FrozenPrefix(task.model, edited)
        self.states: Tensor | None = None
        self.logits: Tensor | None = None

    def loss(self) -> Float[Tensor, " episode"]:
        """The pairs' losses, from one pass; what enters the lowest edited block on the way is kept."""
        batch = self.batch
        with self.prefix.record_input() as entered:
            logits = self.task.outputs(batch)
        self.logits, self.states = logits.detach().float(), entered.get("states")
        return target_loss(logits, batch.target, batch.row, batch.rows)

    @torch.no_grad()
    def margins(self, changes: Mapping[str, LowRank]) -> Float[Tensor, " episode"]:
        """How far each target is ahead of its best rival in the edited model, in logits: at its first token."""
        modules = find_modules(self.task.model, changes)
        with self.prefix.resume_from(self.states), changes_applied(modules, changes):
            return self.margins_of(self.task.outputs(self.batch).float())

    def margins_of(self, logits: Float[Tensor, "target vocabulary"]) -> Float[Tensor, " episode"]:
        """The same of given logits."""
        row, target = self.batch.row.to(logits.device), self.batch.target.to(logits.device)[:, None]
        rival = logits.scatter(1, target, -torch.inf).max(1).values
        ahead = logits.gather(1, target)[:, 0] - rival
        if not self.whole:
            first = torch.ones_like(row, dtype=torch.bool)
            first[1:] = row[1:] != row[:-1]
            ahead, row = ahead[first], row[first]
        weakest = ahead.new_full((self.batch.rows,), torch.inf).scatter_reduce(0, row, ahead, "amin")
        return weakest.to(self.batch.row.device)

    @torch.no_grad()
    def check(self) -> None:
        """Run whole passes from now on where a pass of the unedited model from the cut gives other logits."""
        if self.states is None:
            return
        assert self.logits is not None
        if not self.prefix.check_resume(self.states, lambda: self.task.outputs(self.batch), self.logits):
            self.states = None


@torch.no_grad()
def taking_scales(
    unedited: UneditedPass, changes: Mapping[str, LowRank], settle: float = 1.0
) -> Float[Tensor, " episode"]:
    """For each edit pair the scale of its change at which it just takes: its target's first token, or all of it.

    Found by false position on :meth:`UneditedPass.margins`. Edits that never take (up to :data:`LARGEST`) get the scale
    which they came nearest. Those of what the model answers anyway get 0 if they would unlearn it (editors are trained
    to change answers), and else what :func:`settled` makes a 1 of.

    Args:
        unedited: the pass in which the edits' gradients were taken, one pair for each episode of ``changes``.
        changes: what the edits do.
        settle: the factor of the scales that :func:`settled` takes.
    """
    with frozen(unedited.task.model):
        return _taking_scales(unedited, changes, settle)


def _taking_scales(unedited: UneditedPass, changes: Mapping[str, LowRank], settle: float) -> Float[Tensor, " episode"]:
    assert unedited.logits is not None, "the loss comes first"
    unedited.check()

    def margins(scale: Float[Tensor, " episode"]) -> Float[Tensor, " episode"]:
        return unedited.margins({name: change.scaled(scale[:, None, None]) for name, change in changes.items()})

    below = unedited.margins_of(unedited.logits)
    known = below > 0
    low, high = torch.zeros_like(below), torch.ones_like(below)
    above = margins(high)
    stays = torch.where(above > 0, torch.full_like(above, 1 / settle), torch.zeros_like(above))
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
    return torch.where(known, stays, scale)


def settled(
    unedited: UneditedPass, changes: Mapping[str, LowRank], settle: float, tokens: Mapping[str, Sequence[int]]
) -> dict[str, LowRank]:
    """The changes with what acts at the first token of the target scaled by √(settle · s).

    Args:
        unedited: the pass in which the edits' gradients were taken.
        changes: what the edits do.
        settle: the factor of s.
        tokens: how many factor pairs of each change belong to each episode. Where they are as many as the target has
            tokens (of experts: a multiple of that), the first is the first token's; else (all tokens take part) all are
            scaled.
    """
    scales = (settle * taking_scales(unedited, changes, settle)).sqrt()
    lengths = torch.bincount(unedited.batch.row).tolist()
    found = {}
    for name, change in changes.items():
        factor = scales[:, None, None].expand(-1, change.rank, 1).clone()
        for episode, (own, length) in enumerate(zip(tokens[name], lengths, strict=True)):
            slots = 1 if change.experts is None else own // length
            if own and own == slots * length:
                factor[episode, slots:] = 1
        found[name] = change.scaled(factor)
    return found


def _crossing(low: Tensor, high: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """Where a straight line through both margins is zero."""
    return low + (high - low) * (-below / (above - below).clamp(min=1e-6)).clamp(0, 1)
