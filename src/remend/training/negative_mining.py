"""Near negatives: prompts that an edit leaks to most easily, for requests that name none."""

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
"""Negatives that are found for each request."""

CHUNK = 1_024
"""Requests that are compared with all others at a time."""


@torch.no_grad()
def mine(episodes: Episodes, constants: ActivationCache) -> int:
    """Give each request that has no near negatives the edit prompts of others that look most like its own.

    Prompts are compared by the base model's last hidden state at the token that is to answer, about its mean: the
    cosine is largest where the model is about to say the like. Prompts of the request's own fact are left out. What is
    kept at a mined prompt is the unedited model's prediction along the other request's pair.

    Returns:
        For how many requests negatives were mined.
    """
    wanting = [place for place, episode in enumerate(episodes.episodes) if not episode.near]
    if not wanting:
        return 0
    pool = list({episode.edit.input: episode.edit for episode in episodes.episodes}.values())
    states = torch.cat([_answering(pool[at : at + 32], constants) for at in range(0, len(pool), 32)])
    states = torch.nn.functional.normalize(states - states.mean(0), dim=-1)
    place_of = {pair.input: place for place, pair in enumerate(pool)}
    for at in range(0, len(wanting), CHUNK):
        chunk = wanting[at : at + CHUNK]
        own = states[[place_of[episodes.episodes[i].edit.input] for i in chunk]]
        # A fact's own prompts may be the nearest: so many more are looked at.
        most = max(len(episodes.episodes[i].prompts) for i in chunk)
        nearest = (own @ states.T).topk(min(MINED + most, len(pool))).indices.tolist()
        for i, found in zip(chunk, nearest, strict=True):
            about = episodes.episodes[i].prompts
            near = tuple(pool[place] for place in found if pool[place].input not in about)[:MINED]
            episodes.episodes[i] = replace(episodes.episodes[i], near=near)
    return len(wanting)


def _answering(pairs: Sequence[Example], constants: ActivationCache) -> Float[Tensor, "pair d"]:
    """The last hidden state at the token that predicts the first target token of each pair."""
    states = constants.base_states(pairs, constants.prefix_states(pairs)).float()
    firsts = [0]
    for pair in pairs[:-1]:
        firsts.append(firsts[-1] + len(pair.target))
    return states[firsts]
