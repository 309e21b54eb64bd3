"""What a model's matrices read when it is about nothing in particular: the ground that edits stand out from."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from remend.core.capture import explain_non_finite, record_inputs
from remend.core.hooks import frozen
from remend.core.layers import dimensions
from remend.core.operators import SymmetricOperator
from remend.core.sketching import SketchedMoment, random_test_matrix, sketch_directions
from remend.core.whitening import SecondMoment
from remend.errors import ConfigError, NonFiniteError
from remend.tasks.base import Example, Task
from remend.tasks.causal_lm import CausalLM
from remend.tasks.language_model import LanguageTask

WINDOWS, TOKENS = 256, 24
"""How many stretches a model writes by itself, and of how many tokens at most."""
WINDOW = 128
"""Tokens of a stretch of a given text."""
LARGEST = 65_536
"""Tokens of a given text that are read, at most."""
BATCH = 32


def stretches(task: Task, text: Sequence[str], seed: int = 0, count: int = WINDOWS) -> list[Example]:
    """Ordinary input of a model: stretches of ``text``, drawn from all of it, or what the model makes of beginnings.

    Without a text, a decoder goes on from one random token by sampling. An encoder-decoder and a classifier are shown
    random tokens; the former answers them greedily, since only so is there anything for its decoder to read. Of what
    there is no text for, there are ``count``.

    Raises:
        ConfigError: the text is empty.
        NonFiniteError: what the model writes is not finite.
    """
    if text:
        shown = _drawn([task.prompt_ids(passage) for passage in text if passage.strip()], task, seed)
    else:
        shown = _written(task, seed, count)
    return [Example(own, own[:1]) for own in shown] if isinstance(task, CausalLM) else _answered(task, shown)


def whiteners(
    task: Task, modules: Mapping[str, nn.Module], pairs: Sequence[Example], ridge: float
) -> dict[str, SymmetricOperator]:
    """For each matrix what whitens its inputs over some stretches; the identity where nothing reaches it.

    Inputs of many dimensions are whitened in some directions only (:mod:`remend.core.sketching`).
    """
    moments = second_moments(task, modules, pairs, sketched=True)
    return {name: moment.whitener(ridge) for name, moment in moments.items()}


@torch.no_grad()
def second_moments(
    task: Task, modules: Mapping[str, nn.Module], pairs: Sequence[Example], sketched: bool = False
) -> dict[str, SecondMoment]:
    """For each matrix the second moment of its inputs at every token of some stretches.

    Args:
        task: the model.
        modules: the matrices, by name.
        pairs: of :func:`stretches`.
        sketched: whether those of wide inputs are known in some directions only.
    """
    moments: dict[str, SecondMoment] = {}
    test_matrix = cache(random_test_matrix)  # matrices of one width share it

    def nothing(name: str, device: torch.device) -> SecondMoment:
        d = dimensions(modules[name])[0]
        directions = sketch_directions(d) if sketched else None
        if directions:
            return SketchedMoment(test_matrix(d, directions, device), directions)
        return SecondMoment(d, device)

    for start in range(0, len(pairs), BATCH):
        batch = task.collate(pairs[start : start + BATCH])
        found = record_inputs(task.model, modules, batch.rows, partial(task.target_logits, batch))
        counted = task.tokens(batch, modules, predicting=False)
        for name, seen in found.items():
            if name not in moments:
                moments[name] = nothing(name, seen.x.device)
            mask, read = counted[name].to(seen.x.device), seen.x.shape[1]
            if seen.experts is not None:  # as many rows of a token as it has experts
                mask = mask.repeat_interleave(read // mask.shape[1], 1)
            elif read != mask.shape[1]:  # another sequence than the batch's own (a layer over an encoder's output)
                mask = mask.new_ones(seen.x.shape[:2])
            moments[name].update(seen.x, mask)
    return moments


def _drawn(passages: Sequence[list[int]], task: Task, seed: int) -> list[tuple[int, ...]]:
    """Stretches of tokenised passages in random order, until they hold :data:`LARGEST` tokens."""
    length, parts = min(WINDOW, task.context or WINDOW), []
    for ids in passages:
        begin = ids[:1] if ids[0] == task.tokenizer.bos_token_id else []  # a model that reads one reads it before all
        own, room = ids[len(begin) :], length - len(begin)
        parts += [(*begin, *own[start : start + room]) for start in range(0, len(own), room)]
    if not parts:
        raise ConfigError("the text for an editor's statistics is empty: give one that holds words, or none")
    random.Random(f"{seed} text").shuffle(parts)
    shown: list[tuple[int, ...]] = []
    tokens = 0
    for part in parts:
        if shown and tokens + len(part) > LARGEST:
            break
        shown.append(part)
        tokens += len(part)
    return shown


def _written(task: Task, seed: int, count: int) -> list[tuple[int, ...]]:
    """What a decoder samples after random tokens; of other models, random tokens."""
    special, known = set(task.tokenizer.all_special_ids), len(next(task.model.get_input_embeddings().parameters()))
    ordinary = torch.tensor([token for token in range(min(len(task.tokenizer), known)) if token not in special])
    draw = torch.Generator().manual_seed(seed)
    length = 1 if isinstance(task, CausalLM) else min(TOKENS, task.context or TOKENS) - 2
    shown: Tensor = ordinary[torch.randint(len(ordinary), (count, length), generator=draw)]
    if not isinstance(task, CausalLM):
        return [tuple(own) for own in shown.tolist()]
    begin = [token for token in task.ids("") if token == task.tokenizer.bos_token_id][:1]
    shown = torch.cat([torch.tensor(begin, dtype=torch.long).expand(count, -1), shown], 1)
    room = min(TOKENS, (task.context or TOKENS) - shown.shape[1])
    with frozen(task.model), torch.no_grad():
        for _ in range(room):  # no cache: the texts are short, and every model can do without
            asked = [Example(tuple(own), (0,)) for own in shown.tolist()]
            logits = task.target_logits(task.collate(asked)).float().cpu()
            if not logits.isfinite().all():
                raise NonFiniteError(f"what the model would say is not finite{explain_non_finite(task.model)}")
            shown = torch.cat([shown, torch.multinomial(logits.softmax(-1), 1, generator=draw)], 1)
    return [_ended(own, task.ends) for own in shown.tolist()]


def _ended(ids: list[int], ends: frozenset[int]) -> tuple[int, ...]:
    """The tokens before the first one that ends a text."""
    first = next((place for place, token in enumerate(ids[1:], start=1) if token in ends), len(ids))
    return tuple(ids[:first])


def _answered(task: Task, shown: Sequence[tuple[int, ...]]) -> list[Example]:
    """The same with what the model first says to each."""
    found: list[Example] = []
    for start in range(0, len(shown), BATCH):
        some = [Example(own, (0,)) for own in shown[start : start + BATCH]]
        for _ in range(4 if isinstance(task, LanguageTask) else 1):
            with frozen(task.model), torch.no_grad():
                batch = task.collate(some)
                last = torch.zeros(batch.rows, dtype=torch.long, device=batch.row.device)
                said = task.target_logits(batch).argmax(-1)
                last[batch.row] = said  # the last target of a row comes last
            some = [
                Example(pair.prompt, (*pair.target[:-1], token, 0))
                for pair, token in zip(some, last.tolist(), strict=True)
            ]
        found += [Example(pair.prompt, pair.target[:-1]) for pair in some]
    return found
