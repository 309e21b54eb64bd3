"""How sure one can be of an edit that no trained editor vouches for: what it does where nobody gave examples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from remend.core.hooks import frozen
from remend.edit import Edit
from remend.request import EditRequest
from remend.tasks.base import Example, Task
from remend.tasks.causal_lm import CausalLM
from remend.tasks.generative import GenerativeTask

CONTEXTS, WORDS = 16, 3
"""How many other beginnings an edited prompt is asked after, and of how many tokens."""
LIKELY, HELD, STAYED = 0.5, 0.75, 0.98
"""What the figures of an edit that is likely to be what was wanted are, at least."""
FEWEST = 4
"""Beginnings that the unedited model must bear, for their share to say something."""
ELSEWHERE = 128
"""Stretches of other input at which the model's choices are compared."""
BATCH = 32


@dataclass(frozen=True)
class Robustness:
    """What was measured of an edit beyond its own prompts.

    Attributes:
        probability: of the whole target after the prompt; the mean over the requests.
        in_context: the share of other beginnings after which the prompt still gets its target, of those after which
            the unedited model still gives its own answer; None where it never does, and of a classifier, which judges
            its whole text.
        elsewhere: the share of the model's choices on other input that stayed.
        beginnings: how many ``in_context`` is a share of.
        choices: how many ``elsewhere`` is.
    """

    probability: float
    in_context: float | None
    elsewhere: float
    beginnings: int = 0
    choices: int = 0

    @property
    def doubts(self) -> list[str]:
        """Which of the figures are below what an edit that is likely to be what was wanted has, in words."""
        found = {
            f"the probability is below {LIKELY:.0%}": self.probability < LIKELY,
            f"it should hold after {HELD:.0%} of beginnings": self.in_context is not None and self.in_context < HELD,
            f"{STAYED:.0%} of other choices should stay": self.elsewhere < STAYED,
        }
        return [words for words, doubtful in found.items() if doubtful]

    @property
    def sure(self) -> bool:
        """Whether all that could be measured is such that the edit is likely to be what was wanted."""
        return not self.doubts

    def to_json(self) -> dict[str, float | bool | None]:
        """The figures and the verdict."""
        return {**asdict(self), "sure": self.sure}


@torch.no_grad()
def assure(
    task: Task,
    edit: Edit,
    requests: Sequence[EditRequest],
    text: Sequence[str] = (),
    seed: int = 0,
) -> Robustness:
    """Measure an edit where its requests name no examples.

    Args:
        task: the base model.
        edit: what was made of the requests.
        requests: what it is for.
        text: other input; by default what the model writes by itself (of classifiers and encoder-decoders: random
            tokens).
        seed: of what is drawn. It is another one than editors take, or an edit would be examined on what it was fitted
            to.
    """
    other = task.ordinary_examples(text, seed + 1, ELSEWHERE)
    draw = random.Random(f"{seed} assurance")
    asked = [task.encode(request.prompt, request.target) for request in requests]
    within = [_begun(task, other, pair, draw) for pair in asked for _ in range(CONTEXTS)]
    elsewhere = draw.sample(other, min(ELSEWHERE, len(other)))
    if isinstance(task, CausalLM):  # it chooses after every token
        elsewhere = [Example(own.input[:1], own.input[1:]) for own in elsewhere if len(own.input) > 1]
    alone, begun, before = (_looked(task, some).first for some in (asked, within, elsewhere))
    with edit.applied(task.model):
        own, held, after = (_looked(task, some) for some in (asked, within, elsewhere))
    known = _opening(begun, within) == _opening(alone, asked).repeat_interleave(CONTEXTS)
    count = int(known.sum()) if isinstance(task, GenerativeTask) else 0
    return Robustness(
        probability=float(own.log_p.exp().mean()),
        in_context=float(held.whole[known].float().mean()) if count >= FEWEST else None,
        elsewhere=float((before == after.first).float().mean()) if len(before) else 1.0,
        beginnings=count,
        choices=len(before),
    )


def _begun(task: Task, other: Sequence[Example], pair: Example, draw: random.Random) -> Example:
    """A pair whose prompt comes after the beginning of something else, if both fit into the model's context."""
    special = set(task.processor.all_special_ids)
    start = [token for token in draw.choice(other).input if token not in special][:WORDS]
    lead = next((i for i, token in enumerate(pair.input) if token not in special), 0)
    begun = Example((*pair.input[:lead], *start, *pair.input[lead:]), pair.target)
    return begun if task.context is None or task.context_length(begun) <= task.context else pair


@dataclass(frozen=True, eq=False)
class _Looked:
    """First choices along some pairs, whether each pair's are its whole target, and that one's log probability."""

    first: Tensor
    whole: Tensor
    log_p: Tensor


def _opening(first: Tensor, pairs: Sequence[Example]) -> Tensor:
    """The first choice at each pair's first target."""
    lengths = torch.tensor([len(pair.target) for pair in pairs])
    return first[lengths.cumsum(0) - lengths]


def _looked(task: Task, pairs: Sequence[Example]) -> _Looked:
    chosen, right, log_p = [], [], []
    for start in range(0, len(pairs), BATCH):
        batch = task.collate(pairs[start : start + BATCH])
        with frozen(task.model):
            logits = task.outputs(batch).float()
        first = logits.argmax(-1)
        own = torch.ones(batch.rows, dtype=torch.bool, device=batch.row.device)
        own[batch.row[first != batch.target]] = False
        along = logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
        chosen.append(first.cpu())
        right.append(own.cpu())
        log_p.append(torch.zeros(batch.rows, device=along.device).index_add_(0, batch.row, along).cpu())
    return _Looked(*(torch.cat(part) if part else torch.zeros(0) for part in (chosen, right, log_p)))
