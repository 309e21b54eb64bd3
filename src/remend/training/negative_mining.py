"""Mines near negatives, the prompts that an edit leaks to most easily, for requests that name none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from remend.tasks.base import Example
from remend.training.activation_cache import ActivationCache
from remend.training.episodes import Episodes

MINED = 4
"""The number of negatives mined for each request."""

STATES_BATCH = 32
"""The number of prompts whose hidden states are looked up together."""

COMPARED_REQUESTS = 1_024
"""The number of requests that are compared with all others at a time: bounds the memory of the similarities."""


@torch.no_grad()
def mine(episodes: Episodes, activation_cache: ActivationCache) -> int:
    """Give each request without near negatives the edit prompts of other requests that are most similar to its own.

    The similarity of two prompts is the cosine of the base model's last hidden states at the token that predicts the
    answer, after subtracting their mean. It is largest where the model is about to give similar answers. Prompts of the
    same fact are left out. At a mined prompt, training keeps the unedited model's prediction along the other request's
    target.

    Returns:
        The number of requests for which negatives were mined.
    """
    without = [index for index, episode in enumerate(episodes.episodes) if not episode.near]
    if not without:
        return 0
    pool = list({episode.edit.input: episode.edit for episode in episodes.episodes}.values())
    parts = [pool[start : start + STATES_BATCH] for start in range(0, len(pool), STATES_BATCH)]
    states = torch.cat([_answer_states(part, activation_cache) for part in parts])
    states = torch.nn.functional.normalize(states - states.mean(0), dim=-1)
    pool_index = {example.input: index for index, example in enumerate(pool)}
    for start in range(0, len(without), COMPARED_REQUESTS):
        chunk = without[start : start + COMPARED_REQUESTS]
        queries = states[[pool_index[episodes.episodes[i].edit.input] for i in chunk]]
        # The nearest may be prompts of the same fact, which are dropped below: take as many more.
        dropped = max(len(episodes.episodes[i].prompts) for i in chunk)
        nearest = (queries @ states.T).topk(min(MINED + dropped, len(pool))).indices.tolist()
        for i, indices in zip(chunk, nearest, strict=True):
            same_fact = episodes.episodes[i].prompts
            near = tuple(pool[index] for index in indices if pool[index].input not in same_fact)[:MINED]
            episodes.episodes[i] = replace(episodes.episodes[i], near=near)
    return len(without)


def _answer_states(examples: Sequence[Example], activation_cache: ActivationCache) -> Float[Tensor, "example d"]:
    """Return the last hidden state at the token that predicts the first target token of each example."""
    states = activation_cache.base_states(examples, activation_cache.prefix_states(examples)).float()
    first_rows = [0]
    for example in examples[:-1]:
        first_rows.append(first_rows[-1] + len(example.target))
    return states[first_rows]
