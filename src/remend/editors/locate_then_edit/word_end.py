"""Teach that a target's last word ends, where a model's answers do not end: else "tide" may become "tidepools"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from remend.core.low_rank_hooks import frozen
from remend.request import Prompt
from remend.tasks.base import EDIT_BATCH_SIZE, Example, Task
from remend.tasks.causal_lm import CausalLM
from remend.tasks.open_answers import may_go_on_with_word

CANDIDATES = 64
"""Next tokens, from the most probable on, of which one should begin something new."""

AnyExample = TypeVar("AnyExample", bound=Example)


def with_word_end(task: Task, prompt: Prompt, examples: Sequence[Example]) -> tuple[Example, ...]:
    """Return the examples of a request with one more target token: what the unedited model writes after the target.

    Args:
        task: the model.
        prompt: the request's own prompt.
        examples: its examples; the first one with a target stands for all that have it (:func:`with_word_ends`).
    """
    first: dict[tuple[int, ...], Example] = {}
    for example in examples:
        first.setdefault(tuple(example.target), example)
    ended = with_word_ends(task, [prompt] * len(first), list(first.values()))
    target_of = dict(zip(first, (example.target for example in ended), strict=True))
    return tuple(replace(example, target=target_of[tuple(example.target)]) for example in examples)


@torch.no_grad()
def with_word_ends(task: Task, prompts: Sequence[Prompt], examples: Sequence[AnyExample]) -> list[AnyExample]:
    """Return examples with one more target token each: what the unedited model writes after the target.

    It is the most probable token with which the target's last word surely ends (a hyphen may join it to another one).
    Where the model ends its answers, or no such token is likely, an example is returned as it is.

    Args:
        task: the model.
        prompts: what is asked.
        examples: each prompt with its target.
    """
    ended = list(examples)
    if not isinstance(task, CausalLM):
        return ended
    open_ones = [index for index, prompt in enumerate(prompts) if not task.ends_answer(prompt)]
    order = sorted(open_ones, key=lambda index: len(examples[index].input) + len(examples[index].target))
    with frozen(task.model):
        for start in range(0, len(order), EDIT_BATCH_SIZE):
            part = order[start : start + EDIT_BATCH_SIZE]
            texts = [Example((*examples[index].input, *examples[index].target), (0,)) for index in part]
            for index, after in zip(part, task.outputs(task.collate(texts)), strict=True):
                candidates = after.topk(min(CANDIDATES, len(after))).indices.tolist()
                target = examples[index].target
                if (end := _find_word_end(task, target, candidates)) is not None:
                    ended[index] = replace(examples[index], target=(*target, end))
    return ended


def _find_word_end(task: CausalLM, target: Sequence[int], candidates: Sequence[int]) -> int | None:
    """Return the first of the tokens with which the target's last word ends."""
    written = task.decode_tokens(target)
    special = set(task.processor.all_special_ids)
    for token in candidates:
        text = task.decode_tokens((*target, token))
        following = text[len(written) :]
        if (
            token not in special
            and text.startswith(written)
            and following
            and not may_go_on_with_word(written, following)
        ):
            return token
    return None
