"""Teach that a target's last word ends, where a model's answers do not end: else "tide" may become "tidepools"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from remend.core.low_rank_hooks import frozen
from remend.request import Prompt
from remend.tasks.base import Example, Task
from remend.tasks.causal_lm import CausalLM
from remend.tasks.open_answers import may_go_on_with_word

CANDIDATES = 64
"""Next tokens, from the most probable on, of which one should begin something new."""


@torch.no_grad()
def with_word_end(task: Task, prompt: Prompt, examples: Sequence[Example]) -> tuple[Example, ...]:
    """Return the examples of a request with one more target token: what the unedited model writes after the target.

    It is the most probable token after the first example with which the target's last word surely ends (a hyphen may
    join it to another one). Where the model ends its answers, or no such token is likely, the examples are returned as
    they are.

    Args:
        task: the model.
        prompt: the request's own prompt.
        examples: examples with one target, the prompt's own first.
    """
    if not isinstance(task, CausalLM) or task.ends_answer(prompt):
        return tuple(examples)
    own = examples[0]
    with frozen(task.model):
        after = task.outputs(task.collate([Example((*own.input, *own.target), (0,))]))[0]
    written = task.decode_tokens(own.target)
    special = set(task.processor.all_special_ids)
    for token in after.topk(min(CANDIDATES, len(after))).indices.tolist():
        text = task.decode_tokens((*own.target, token))
        following = text[len(written) :]
        if (
            token not in special
            and text.startswith(written)
            and following
            and not may_go_on_with_word(written, following)
        ):
            return tuple(replace(example, target=(*example.target, token)) for example in examples)
    return tuple(examples)
