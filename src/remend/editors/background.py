"""What a model's matrices read when it is about nothing in particular: the ground that edits stand out from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from remend.core.branch import frozen
from remend.core.capture import inputs
from remend.core.symmetric import Symmetric
from remend.core.whitening import SecondMoment
from remend.errors import ConfigError
from remend.tasks.task import Pair, Task

WINDOWS, TOKENS = 256, 24
"""How many stretches a model writes by itself, and of how many tokens at most."""
WINDOW = 128
"""Tokens of a stretch of a given text."""
LARGEST = 65_536
"""Tokens of a given text that are read, at most."""
BATCH = 32


def stretches(task: Task, text: Sequence[str], seed: int = 0) -> list[Pair]:
    """Ordinary input of a model: stretches of ``text`` or, without one, what it makes of random beginnings.

    A decoder goes on from one random token by sampling. An encoder-decoder and a classifier are shown random tokens;
    the former answers them greedily, since only so is there anything for its decoder to read.

    Raises:
        ConfigError: the text is empty.
    """
    if text:
        length = min(WINDOW, task.context or WINDOW)
        ids = [task.prompt_ids(passage) for passage in text if passage.strip()]
        parts = [tuple(own[start : start + length]) for own in ids for start in range(0, len(own), length)]
        if not parts:
            raise ConfigError("the text for an editor's statistics is empty: give one that holds words, or none")
        shown = parts[: max(1, LARGEST // length)]
    else:
        shown = _written(task, seed)
    return [Pair(own, own[:1]) for own in shown] if _writes(task) else _answered(task, shown)


def whiteners(
    task: Task, modules: Mapping[str, nn.Module], pairs: Sequence[Pair], ridge: float
) -> dict[str, Symmetric]:
    """For each matrix what whitens its inputs over some stretches; the identity where nothing reaches it."""
    return {name: moment.whitener(ridge) for name, moment in second_moments(task, modules, pairs).items()}


@torch.no_grad()
def second_moments(task: Task, modules: Mapping[str, nn.Module], pairs: Sequence[Pair]) -> dict[str, SecondMoment]:
    """For each matrix the second moment of its inputs at every token of some stretches."""
    moments: dict[str, SecondMoment] = {}
    for start in range(0, len(pairs), BATCH):
        batch = task.collate(pairs[start : start + BATCH])
        found = inputs(task.model, modules, batch.rows, partial(task.target_logits, batch))
        counted = task.tokens(batch, modules, predicting=False)
        for name, seen in found.items():
            moment = moments.setdefault(name, SecondMoment(seen.x.shape[-1], seen.x.device))
            mask = counted[name].to(seen.x.device)
            moment.update(seen.x, mask.repeat_interleave(seen.x.shape[1] // mask.shape[1], 1))
    return moments


def _writes(task: Task) -> bool:
    """Whether the model is a decoder: its prompt's every token is read by the matrices that write."""
    return bool(task.ends) and not task.model.config.is_encoder_decoder


def _written(task: Task, seed: int) -> list[tuple[int, ...]]:
    """What a decoder samples after random tokens; of other models, random tokens."""
    special = set(task.tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(task.tokenizer)) if token not in special])
    draw = torch.Generator().manual_seed(seed)
    length = 1 if _writes(task) else min(TOKENS, task.context or TOKENS) - 2
    shown: Tensor = ordinary[torch.randint(len(ordinary), (WINDOWS, length), generator=draw)]
    if not _writes(task):
        return [tuple(own) for own in shown.tolist()]
    room = min(TOKENS, (task.context or TOKENS) - 1)
    with frozen(task.model), torch.no_grad():
        for _ in range(room):  # no cache: the texts are short, and every model can do without
            asked = [Pair(tuple(own), (0,)) for own in shown.tolist()]
            logits = task.target_logits(task.collate(asked)).float().cpu()
            shown = torch.cat([shown, torch.multinomial(logits.softmax(-1), 1, generator=draw)], 1)
    return [_ended(own, task.ends) for own in shown.tolist()]


def _ended(ids: list[int], ends: frozenset[int]) -> tuple[int, ...]:
    """The tokens before the first one that ends a text."""
    first = next((place for place, token in enumerate(ids[1:], start=1) if token in ends), len(ids))
    return tuple(ids[:first])


def _answered(task: Task, shown: Sequence[tuple[int, ...]]) -> list[Pair]:
    """The same with what the model first says to each."""
    found: list[Pair] = []
    for start in range(0, len(shown), BATCH):
        some = [Pair(own, (0,)) for own in shown[start : start + BATCH]]
        for _ in range(4 if task.ends else 1):
            with frozen(task.model), torch.no_grad():
                batch = task.collate(some)
                last = torch.zeros(batch.rows, dtype=torch.long, device=batch.row.device)
                said = task.target_logits(batch).argmax(-1)
                last[batch.row] = said  # the last target of a row comes last
            some = [
                Pair(pair.prompt, (*pair.target[:-1], token, 0))
                for pair, token in zip(some, last.tolist(), strict=True)
            ]
        found += [Pair(pair.prompt, pair.target[:-1]) for pair in some]
    return found
