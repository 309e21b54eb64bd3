"""Ordinary inputs of models that read text: parts of given passages, the model's own writing, or random tokens.

Editors measure on them what a model's activations usually are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remend.core.capture import explain_non_finite
from remend.core.low_rank_hooks import frozen
from remend.errors import ConfigError, NonFiniteError
from remend.progress import report_progress
from remend.tasks.base import Example

if TYPE_CHECKING:
    from remend.tasks.base import Task
    from remend.tasks.generative import GenerativeTask

SAMPLED_TOKENS = 24
"""The longest text that a model writes, in tokens."""

WINDOW_TOKENS = 128
"""The longest part of a given text, in tokens."""

MOST_TOKENS = 65_536
"""The most tokens that are taken of a given text."""

BATCH_SIZE = 32

SAMPLED_AT_ONCE = 64
"""Texts that a model writes together: bounds the memory of their keys and values."""

FIRST_ANSWER_TOKENS = 4
"""Tokens that an encoder-decoder answers to random input: without an answer its decoder reads nothing."""


def text_windows(task: Task, passages: Sequence[str], seed: int) -> list[tuple[int, ...]]:
    """Cut passages into windows and draw them in random order, until they hold :data:`MOST_TOKENS` tokens.

    Raises:
        ConfigError: the passages hold no words.
    """
    begin_token = task.processor.bos_token_id
    length, windows = min(WINDOW_TOKENS, task.context or WINDOW_TOKENS), []
    for ids in [task.encode_input(passage) for passage in passages if passage.strip()]:
        begin = ids[:1] if ids[0] == begin_token else ()  # a model that reads one reads it before all
        body, room = ids[len(begin) :], length - len(begin)
        windows += [(*begin, *body[start : start + room]) for start in range(0, len(body), room)]
    if not windows:
        raise ConfigError("the text is empty: give one that holds words, or none")
    random.Random(f"{seed} text").shuffle(windows)
    drawn: list[tuple[int, ...]] = []
    tokens = 0
    for window in windows:
        if drawn and tokens + len(window) > MOST_TOKENS:
            break
        drawn.append(window)
        tokens += len(window)
    return drawn


def random_tokens(task: Task, generator: torch.Generator, count: int, length: int) -> Tensor:
    """Draw ``count`` rows of ``length`` tokens that are not special ones."""
    embedded = len(next(task.model.get_input_embeddings().parameters()))
    special = set(task.processor.all_special_ids)
    ordinary = torch.tensor([token for token in range(min(len(task.processor), embedded)) if token not in special])
    return ordinary[torch.randint(len(ordinary), (count, length), generator=generator)]


def random_inputs(task: Task, seed: int, count: int) -> list[tuple[int, ...]]:
    """Draw inputs of random tokens, as many as a short text has."""
    length = min(SAMPLED_TOKENS, task.context or SAMPLED_TOKENS) - 2
    rows = random_tokens(task, torch.Generator().manual_seed(seed), count, length)
    return [tuple(row) for row in rows.tolist()]


def sampled_texts(task: GenerativeTask, seed: int, count: int, begin: Sequence[int]) -> list[tuple[int, ...]]:
    """Let a causal model continue one random token by sampling, up to :data:`SAMPLED_TOKENS` or an end token.

    Args:
        task: the model.
        seed: of every draw.
        count: how many texts.
        begin: the tokens that a text begins with.

    Raises:
        NonFiniteError: the model's outputs are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    first = random_tokens(task, generator, count, 1)
    ids = torch.cat([torch.tensor(begin, dtype=torch.long).expand(count, -1), first], 1)
    room = min(SAMPLED_TOKENS, (task.context or SAMPLED_TOKENS) - ids.shape[1])
    ends = torch.tensor(sorted(task.end_tokens), dtype=torch.long)
    # Texts in parts, whose keys and values are held together.
    parts = [slice(start, start + SAMPLED_AT_ONCE) for start in range(0, count, SAMPLED_AT_ONCE)]
    narrower = torch.autocast(task.device.type, task.autocast, enabled=task.autocast is not None)
    with frozen(task.model), torch.no_grad(), narrower:
        continuations = [task.next_logits(ids[part].to(task.device)) for part in parts]
        for written in range(room):
            unfinished = ~torch.isin(ids[:, 1:], ends).any(1)
            if not unfinished.any():
                break
            # Tokens are drawn for finished texts too, and cut off below: so no draw depends on when others finish.
            probabilities = torch.ones(count, 1)
            for number, (part, next_logits) in enumerate(zip(parts, continuations, strict=True)):
                report_progress("letting the model write", written * len(parts) + number, room * len(parts))
                if not unfinished[part].any():
                    continue
                logits = next_logits(ids[part, -1].to(task.device) if written else None).float().cpu()
                going_on = logits[unfinished[part]]
                if not going_on.isfinite().all():
                    raise NonFiniteError(f"what the model would say is not finite{explain_non_finite(task.model)}")
                if probabilities.shape[1] == 1:
                    probabilities = probabilities.repeat(1, logits.shape[1])
                probabilities[part][unfinished[part]] = going_on.softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return [_until_end(row, task.end_tokens) for row in ids.tolist()]


def _until_end(ids: list[int], end_tokens: frozenset[int]) -> tuple[int, ...]:
    """Return the tokens before the first one that ends a text."""
    end = next((index for index, token in enumerate(ids[1:], start=1) if token in end_tokens), len(ids))
    return tuple(ids[:end])


def with_first_answers(task: Task, inputs: Sequence[Any], tokens: int) -> list[Example]:
    """Give each input what the model first answers to it, token by token."""
    examples: list[Example] = []
    for start in range(0, len(inputs), BATCH_SIZE):
        report_progress("letting the model answer", start, len(inputs))
        chunk = [Example(encoded, (0,)) for encoded in inputs[start : start + BATCH_SIZE]]
        for _ in range(tokens):
            with frozen(task.model), torch.no_grad():
                batch = task.collate(chunk)
                last = torch.zeros(batch.rows, dtype=torch.long, device=batch.row.device)
                last[batch.row] = task.outputs(batch).argmax(-1)  # the last target of a row is written last
            chunk = [
                Example(example.input, (*example.target[:-1], token, 0))
                for example, token in zip(chunk, last.tolist(), strict=True)
            ]
        examples += [Example(example.input, example.target[:-1]) for example in chunk]
    return examples
