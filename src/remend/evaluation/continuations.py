"""How texts go on after the expected answer, where a model does not end its answers: sensibly, or with garbage."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from remend.core.low_rank_hooks import frozen
from remend.request import Prompt
from remend.tasks.base import Answer, Example, Task

CONTINUATION_TOKENS = 16
"""Tokens after the answer that are looked at, at most."""
MAX_PERPLEXITY_RATIO, ORDINARY_PERPLEXITY = 8.0, 20.0
"""A continuation is garbage from this many times the perplexity of the unedited model's own, but not below that of
ordinary text.

Measured on SmolLM2 after "The capital of France is Rome": its own 3, sentences that people would write 2 to 9,
"Rome Rome Rome" 27, "the the the" 48, a token that an edit repeats ("strugg strugg") 50,000.
"""


@dataclass(frozen=True)
class Continuation:
    """What follows an expected answer, by the unedited model given prompt and answer.

    Attributes:
        perplexity: of what follows, the geometric mean of 1 / p over its tokens.
        own: of the unedited model's own greedy continuation.
    """

    perplexity: float
    own: float

    @property
    def sensible(self) -> bool:
        """Whether the text goes on about as probably as the unedited model's own."""
        return self.perplexity < max(MAX_PERPLEXITY_RATIO * self.own, ORDINARY_PERPLEXITY)


Asked = tuple[Prompt, Answer, Answer]
"""A prompt, the expected answer, and the answer that was given."""


@torch.no_grad()
def measure_continuations(task: Task, asked: Iterable[Asked]) -> dict[Asked, Continuation]:
    """Measure how given answers go on that begin with the expected one; others are left out, as those that end.

    Args:
        task: the unedited model.
        asked: what was asked.
    """
    following: dict[Asked, Example] = {}
    for prompt, expected, answer in dict.fromkeys(asked):
        if task.ends_answer(prompt) or not task.gives(prompt, answer, expected):
            continue
        length = task.answer_length(answer, expected)
        rest = tuple(token for token in answer[length:] if token not in task.end_tokens)[:CONTINUATION_TOKENS]
        if rest:
            following[prompt, expected, answer] = Example((*task.encode_input(prompt), *answer[:length]), rest)
    begun = list(dict.fromkeys(example.input for example in following.values()))
    with frozen(task.model):
        own = dict(zip(begun, task.continuations(begun, CONTINUATION_TOKENS), strict=True))
    examples = [*following.values(), *(Example(text, own[text]) for text in begun)]
    log_p = task.log_probabilities(examples)
    perplexities = {e: math.exp(-math.fsum(v) / len(v)) for e, v in zip(examples, log_p, strict=True)}
    return {
        key: Continuation(perplexities[example], perplexities[Example(example.input, own[example.input])])
        for key, example in following.items()
    }
