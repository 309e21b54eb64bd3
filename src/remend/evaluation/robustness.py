"""``measure_robustness``: what an edit does at inputs that its requests do not name.

It is measured for edits that were made without training, since no evaluation on a data set tells how those behave.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from remend.core.low_rank_hooks import frozen
from remend.edit import Edit
from remend.evaluation.interventions import SharedEdit
from remend.evaluation.neighbours import Neighbours, measure_neighbours
from remend.evaluation.ordinary_text import Elsewhere, OrdinaryText
from remend.request import EditRequest
from remend.tasks.base import LONG_PROMPT, Example, Task

PREFIXES_PER_PROMPT = 16
"""Prefixes after which an edited prompt is given to the model."""
PREFIX_LENGTH = 3
"""Tokens of a prefix."""
MIN_PROBABILITY, MIN_AFTER_PREFIX, MIN_UNCHANGED, MIN_NEIGHBOURS = 0.5, 0.75, 0.98, 0.8
"""The least values of an edit that can be trusted."""
MIN_PREFIXES = 4
"""Prefixes after which the unedited model must give its answer, at least, for their share to be reported."""
ROBUSTNESS_BATCH_SIZE = 32


@dataclass(frozen=True)
class Robustness:
    """What was measured of an edit beyond its own prompts.

    Attributes:
        probability: of the whole target after the prompt; the mean over the requests.
        in_context: the share of prefixes after which the prompt still gets its target, of those after which the
            unedited model still gives its own answer; None where it never does, and of models that do not write text.
        elsewhere: what the edit changes on ordinary text.
        beginnings: the number of prefixes that ``in_context`` is a share of.
        neighbours: what it changes next to the first request; nothing of models that complete no text.
    """

    probability: float
    in_context: float | None
    elsewhere: Elsewhere
    beginnings: int = 0
    neighbours: Sequence[Neighbours] = ()

    @property
    def doubts(self) -> list[str]:
        """The values that are too low for the edit to be trusted, in words."""
        too_low = {
            f"the probability is below {MIN_PROBABILITY:.0%}": self.probability < MIN_PROBABILITY,
            f"it should hold after {MIN_AFTER_PREFIX:.0%} of beginnings": (
                self.in_context is not None and self.in_context < MIN_AFTER_PREFIX
            ),
            f"{MIN_UNCHANGED:.0%} of other choices should stay": self.elsewhere.stays.mean < MIN_UNCHANGED,
            **{
                f"{MIN_NEIGHBOURS:.0%} of {near.kind} should stay": near.stays < MIN_NEIGHBOURS
                for near in self.neighbours
            },
        }
        return [text for text, applies in too_low.items() if applies]

    @property
    def sure(self) -> bool:
        """Whether no value that could be measured is too low."""
        return not self.doubts

    def to_json(self) -> dict[str, Any]:
        """Return the values as a JSON object."""
        return {**asdict(self), "sure": self.sure}


@torch.no_grad()
def measure_robustness(
    task: Task,
    edit: Edit,
    requests: Sequence[EditRequest],
    text: OrdinaryText | None = None,
    seed: int = 0,
) -> Robustness:
    """Measure an edit where its requests name no examples.

    Args:
        task: the base model.
        edit: what was made of the requests.
        requests: what it is for.
        text: ordinary text; by default what the model writes by itself (of models that do not write: random inputs).
        seed: of what is drawn.
    """
    text = text or OrdinaryText(task)
    draw = random.Random(f"{seed} assurance")
    prompts = [task.encode(request.prompt, request.target) for request in requests]
    # A classifier judges its whole input, of which a prefix would be a part.
    short = [task.generates and len(prompt.input) < LONG_PROMPT for prompt in prompts]
    prefixed = [
        _with_prefix(task, text.examples, prompt, draw)
        for prompt, is_short in zip(prompts, short, strict=True)
        if is_short
        for _ in range(PREFIXES_PER_PROMPT)
    ]
    at_prompts, at_prefixed = (_compare(task, edit, examples) for examples in (prompts, prefixed))
    # After other prefixes the unedited model begins another answer: there the prefix changes what is asked.
    without_prefix = at_prompts.first_before[torch.tensor(short)].repeat_interleave(PREFIXES_PER_PROMPT)
    counted = at_prefixed.first_before == without_prefix
    count = int(counted.sum())
    return Robustness(
        probability=float(at_prompts.log_p.exp().mean()),
        in_context=float(at_prefixed.correct[counted].float().mean()) if count >= MIN_PREFIXES else None,
        elsewhere=text.measure(SharedEdit(task, edit))[0],
        beginnings=count,
        neighbours=measure_neighbours(task, edit, requests[0]),
    )


def _with_prefix(task: Task, ordinary: Sequence[Example], example: Example, draw: random.Random) -> Example:
    """Return an example with the first tokens of an ordinary input before its prompt, if the context holds both."""
    special = set(task.processor.all_special_ids)
    prefix = [token for token in task.tokens_read(draw.choice(ordinary)) if token not in special][:PREFIX_LENGTH]
    # Special tokens at the beginning, such as the one that begins a text, stay first.
    lead = next((i for i, token in enumerate(example.input) if token not in special), 0)
    prefixed = Example((*example.input[:lead], *prefix, *example.input[lead:]), example.target)
    return prefixed if task.context is None or task.context_length(prefixed) <= task.context else example


@dataclass(frozen=True, eq=False)
class _Comparison:
    """The model's outputs at some examples before and after an edit.

    Attributes:
        first_before: the first choice before the edit at the first target of each example.
        correct: for each example, whether its whole target is the first choice after the edit.
        log_p: log p of the whole target of each example after the edit, in nats.
    """

    first_before: Shaped[Tensor, " row"]
    correct: Bool[Tensor, " row"]
    log_p: Float[Tensor, " row"]


def _compare(task: Task, edit: Edit, examples: Sequence[Example]) -> _Comparison:
    """Run the model without and with an edit. Outputs are compared batch by batch, since all together may be large."""
    first_before, correct, log_p = [], [], []
    for start in range(0, len(examples), ROBUSTNESS_BATCH_SIZE):
        batch = task.collate(examples[start : start + ROBUSTNESS_BATCH_SIZE])
        with frozen(task.model):
            before = task.outputs(batch)
            with edit.applied(task.model):
                after = task.outputs(batch)
        # Targets lie row after row, so the first of a row follows the last of the row before.
        lengths = torch.bincount(batch.row, minlength=batch.rows)
        first = lengths.cumsum(0) - lengths
        of_targets = task.distribution.log_prob(after, batch.target)
        first_before.append(task.distribution.mode(before)[first].cpu())
        correct.append(task.correct(after, batch).cpu())
        log_p.append(torch.zeros(batch.rows, device=after.device).index_add_(0, batch.row, of_targets).cpu())
    parts = (torch.cat(part) if part else torch.zeros(0) for part in (first_before, correct, log_p))
    return _Comparison(*parts)
