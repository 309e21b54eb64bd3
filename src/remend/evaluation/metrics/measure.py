"""Looking at a model before and after a change: what it says along given answers, and what it answers by itself.

Whether an answer is given freely can be told without decoding: under teacher forcing, a whole answer and its end token
are the first choice at every position exactly if greedy decoding emits that answer and stops. So only answers that
differ from what was looked for are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.hooks import frozen
from remend.evaluation.interventions import Intervention
from remend.evaluation.metrics.functions import divergences, first_choices, log_probabilities, ranks
from remend.request import Prompt
from remend.tasks.base import Example, Task

ROWS_AT_ONCE = 128
LOGITS_AT_ONCE = 2**26
"""Numbers that a batch's logits may have, about: rows are fewer where a vocabulary is large."""
TYPICAL_TARGET = 8
SHORT = 8
"""Tokens that a free answer needs room for, at least; where there is less, a prompt is not asked."""


@dataclass(frozen=True)
class Query:
    """A prompt, and the answer (as in :class:`Example`) along which the model is looked at."""

    prompt: Prompt
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Measurement:
    """One question, looked at before and after a change.

    Attributes:
        before, after: the first choice at each of the expected tokens.
        log_p_before, log_p: log p of the expected answer without its end token, in nats.
        rank: the place of the answer's first token among all tokens after the change, 1 for the most probable.
        divergence: KL(p before ‖ p after), the mean over the expected tokens, in nats.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    log_p_before: float
    log_p: float
    rank: int
    divergence: float


@dataclass(frozen=True)
class Measurements:
    """What was seen for one request after one change: at each question, and each prompt's free answer if wanted.

    What could not be asked after the change is absent.
    """

    seen: Mapping[Query, Measurement]
    answers: Mapping[Prompt, tuple[int, ...]]


@torch.no_grad()
def look(
    task: Task, changes: Sequence[Intervention], wanted: Sequence[Sequence[Query]], limit: int = 32
) -> list[list[Measurements]]:
    """Every request's questions before any change and after each; rows of all requests go together.

    Args:
        task: the base model.
        changes: what to look at it after; what is there before is looked at once for all.
        wanted: for each request its questions.
        limit: how many tokens a free answer may have.

    Returns:
        For each change, for each request, what was seen.
    """
    rows = [Row(number, question) for number, own in enumerate(wanted) for question in dict.fromkeys(own)]
    ids = {prompt: tuple(task.encode_input(prompt)) for prompt in {row.question.prompt for row in rows}}
    rows.sort(key=lambda row: len(ids[row.question.prompt]) + len(row.question.expected))  # like lengths pad least
    seen: list[list[dict[Query, Measurement]]] = [[{} for _ in wanted] for _ in changes]
    vocabulary = task.model.config.get_text_config().vocab_size
    size = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (TYPICAL_TARGET * vocabulary)))
    with frozen(task.model):
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            pairs = [Example(ids[row.question.prompt], row.question.expected) for row in chunk]
            before = task.outputs(task.collate(pairs))
            for change, found in zip(changes, seen, strict=True):
                for row, own in _compared(change, chunk, pairs, before):
                    found[row.number][row.question] = own
    return [_with_answers(change, found, limit) for change, found in zip(changes, seen, strict=True)]


@dataclass(frozen=True)
class Row:
    """One request's question."""

    number: int
    question: Query


def _compared(
    change: Intervention, rows: Sequence[Row], pairs: Sequence[Example], before: Float[Tensor, "target vocabulary"]
) -> Iterator[tuple[Row, Measurement]]:
    """What is seen at those of the rows that can be asked after the change, whose logits ``before`` are given."""
    shown: dict[int, Example] = {}
    for place, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        asked = change.asked(row.number, row.question.prompt, len(pair.target))
        if asked is row.question.prompt:
            shown[place] = pair
        elif asked is not None:
            shown[place] = Example(tuple(change.task.encode_input(asked)), pair.target)
    if not shown:
        return
    counts = torch.tensor([len(pair.target) for pair in pairs])
    kept = torch.isin(torch.arange(len(rows)).repeat_interleave(counts), torch.tensor(list(shown)))
    own = before[kept.to(before.device)]
    after = own
    if change.acts:
        with frozen(change.task.model), change.acting([rows[place].number for place in shown]):
            after = change.task.outputs(change.task.collate(list(shown.values()))).to(own.device)
    target = torch.tensor([token for pair in shown.values() for token in pair.target], device=own.device)
    columns: list[list[Any]] = [
        column.tolist()
        for column in (
            first_choices(own), first_choices(after), log_probabilities(own, target), log_probabilities(after, target),
            ranks(after, target), divergences(own, after),
        )
    ]  # fmt: skip
    start = 0
    for place, pair in shown.items():
        end = start + len(pair.target)
        body = start + body_length(change.task, pair.target)
        chosen, others, log_p, other_log_p, rank, divergence = columns
        yield (
            rows[place],
            Measurement(
                before=tuple(chosen[start:end]),
                after=tuple(others[start:end]),
                log_p_before=math.fsum(log_p[start:body]),
                log_p=math.fsum(other_log_p[start:body]),
                rank=rank[start],
                divergence=math.fsum(divergence[start:end]) / len(pair.target),
            ),
        )
        start = end


def body_length(task: Task, answer: Sequence[int]) -> int:
    """How many tokens of an answer come before its end token."""
    return len(answer) - int(len(answer) > 0 and answer[-1] in task.end_tokens)


def _with_answers(change: Intervention, seen: Sequence[Mapping[Query, Measurement]], limit: int) -> list[Measurements]:
    """The views, with free answers if they are wanted: decoded where what was seen does not tell them."""
    known: list[dict[Prompt, tuple[int, ...]]] = [{} for _ in seen]
    if not change.free:
        return [Measurements(own, answers) for own, answers in zip(seen, known, strict=True)]
    ends = change.task.end_tokens
    for own, answers in zip(seen, known, strict=True):
        for question, one in own.items():
            if question.prompt in change.known:
                answers[question.prompt] = change.known[question.prompt]
            elif one.after == question.expected and (not ends or question.expected[-1] in ends):
                answers[question.prompt] = question.expected
    missing: dict[int, list[tuple[int, Prompt, Prompt]]] = {}
    for number, (own, answers) in enumerate(zip(seen, known, strict=True)):
        for prompt in dict.fromkeys(question.prompt for question in own):
            if prompt not in answers and (asked := change.asked(number, prompt, SHORT)) is not None:
                missing.setdefault(len(change.task.encode_input(asked)), []).append((number, prompt, asked))
    for group in missing.values():  # of one length, which are decoded together
        for start in range(0, len(group), ROWS_AT_ONCE):
            chunk = group[start : start + ROWS_AT_ONCE]
            with change.acting([number for number, _, _ in chunk]):
                found = change.task.predict([asked for _, _, asked in chunk], limit, len(chunk))
            for (number, prompt, _), answer in zip(chunk, found, strict=True):
                known[number][prompt] = answer
    return [Measurements(own, answers) for own, answers in zip(seen, known, strict=True)]
