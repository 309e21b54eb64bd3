"""``measure``: run a model on queries before and after interventions, along given answers and in free answers.

Under teacher forcing, a whole answer and its end token are the first choice at every position exactly if greedy
decoding emits that answer and stops. So only answers that differ from the expected one are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.core.low_rank_hooks import frozen
from remend.evaluation.continuations import Asked, Continuation, measure_continuations
from remend.evaluation.interventions import Intervention
from remend.progress import report_progress
from remend.request import Prompt
from remend.tasks.base import Answer, Example, Task

MEASURE_BATCH_SIZE = 128
"""Queries that go through the model together, at most."""
MAX_BATCH_OUTPUTS = 2**26
"""Numbers that the outputs of a batch may hold, about: batches are smaller where a vocabulary is large."""
TYPICAL_TARGET_LENGTH = 8
"""Targets of a query, about, for :data:`MAX_BATCH_OUTPUTS`."""
MIN_ANSWER_ROOM = 8
"""Tokens that the context must have left for a free answer; otherwise the prompt is not given to the model."""


@dataclass(frozen=True)
class Query:
    """A prompt, and the answer (as in :class:`Example`) along which the model's outputs are measured."""

    prompt: Prompt
    expected: Answer


@dataclass(frozen=True)
class Measurement:
    """What was measured at one query before and after an intervention.

    Attributes:
        correct_before, correct: for each expected target, whether it is the model's first choice.
        unchanged: for each expected target, whether the first choice is the same before and after.
        log_p_before, log_p: log p of the expected answer without its end token, in nats.
        rank: the rank of the answer's first token among all tokens after the intervention, 1 for the most probable;
            None of outputs that are not discrete.
        divergence: the divergence of the distribution after from the one before, the mean over the targets, in nats.
    """

    correct_before: tuple[bool, ...]
    correct: tuple[bool, ...]
    unchanged: tuple[bool, ...]
    log_p_before: float
    log_p: float
    rank: int | None
    divergence: float


@dataclass(frozen=True)
class RequestMeasurements:
    """What was measured for one request after one intervention. Prompts that do not fit then are absent.

    Attributes:
        by_query: the measurement at each query.
        answers: the free answer to each prompt, if answers were decoded.
        continuations: where the model does not end its answers, how those go on that begin with the expected one.
    """

    by_query: Mapping[Query, Measurement]
    answers: Mapping[Prompt, Answer]
    continuations: Mapping[Asked, Continuation] = field(default_factory=dict)


@dataclass(frozen=True)
class _RequestQuery:
    """A query, and the number of the request that it belongs to."""

    number: int
    query: Query


@torch.no_grad()
def measure(
    task: Task,
    interventions: Sequence[Intervention],
    queries: Sequence[Sequence[Query]],
    max_new_tokens: int = 32,
) -> list[list[RequestMeasurements]]:
    """Measure the queries of every request before and after interventions; queries of all requests are batched.

    Args:
        task: the base model.
        interventions: what to measure after; the outputs before are computed once for all of them.
        queries: the queries of each request.
        max_new_tokens: the longest free answer.

    Returns:
        For each intervention, for each request, what was measured.
    """
    rows = [_RequestQuery(number, query) for number, listed in enumerate(queries) for query in dict.fromkeys(listed)]
    encoded = {prompt: task.encode_input(prompt) for prompt in {row.query.prompt for row in rows}}
    pairs = [(row, Example(encoded[row.query.prompt], row.query.expected)) for row in rows]
    pairs.sort(key=lambda pair: len(pair[1]))  # examples of like length need the least padding
    results: list[list[dict[Query, Measurement]]] = [[{} for _ in queries] for _ in interventions]
    outputs_per_query = TYPICAL_TARGET_LENGTH * task.output_size
    size = max(1, min(MEASURE_BATCH_SIZE, MAX_BATCH_OUTPUTS // outputs_per_query))
    with frozen(task.model):
        # The outputs before an intervention are compared batch by batch: over a large vocabulary, all of them together
        # would not fit into memory.
        for start in range(0, len(pairs), size):
            report_progress("measuring prompts before and after edits", start, len(pairs))
            batch_rows = [row for row, _ in pairs[start : start + size]]
            examples = [example for _, example in pairs[start : start + size]]
            before = task.outputs(task.collate(examples))
            for intervention, by_request in zip(interventions, results, strict=True):
                for row, measurement in _compare(task, intervention, batch_rows, examples, before):
                    by_request[row.number][row.query] = measurement
    measurements = []
    for done, (intervention, by_request) in enumerate(zip(interventions, results, strict=True)):
        report_progress("reading free answers", done, len(interventions))
        measurements.append(_with_answers(task, intervention, by_request, max_new_tokens))
    return measurements


def _compare(
    task: Task,
    intervention: Intervention,
    rows: Sequence[_RequestQuery],
    examples: Sequence[Example],
    before: Float[Tensor, "target output"],
) -> Iterator[tuple[_RequestQuery, Measurement]]:
    """Measure those of the rows whose prompt can be given to the model after the intervention.

    Args:
        task: the base model.
        intervention: what to measure after.
        rows: the queries of a batch.
        examples: the same, encoded.
        before: the base model's outputs at the batch.
    """
    edited: dict[int, Example] = {}
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        prompt = intervention.prompt_for(row.number, row.query.prompt, len(example.target))
        if prompt is row.query.prompt:  # unchanged, so encoded already
            edited[index] = example
        elif prompt is not None:
            edited[index] = Example(intervention.task.encode_input(prompt), example.target)
    if not edited:
        return
    counts = torch.tensor([len(example.target) for example in examples])
    # The outputs before, of all rows, hold one row per target; only those of the examples that fit are kept.
    measured = torch.isin(torch.arange(len(rows)).repeat_interleave(counts), torch.tensor(list(edited)))
    before = before[measured.to(before.device)]
    after = before
    if intervention.changes_outputs:
        with frozen(intervention.task.model), intervention.applied([rows[index].number for index in edited]):
            after = intervention.task.outputs(intervention.task.collate(list(edited.values()))).to(before.device)
    measurements = _measurements(task, list(edited.values()), before, after)
    yield from zip((rows[index] for index in edited), measurements, strict=True)


def _measurements(
    task: Task,
    examples: Sequence[Example],
    before: Float[Tensor, "target output"],
    after: Float[Tensor, "target output"],
) -> Iterator[Measurement]:
    """Compare the outputs at the targets of each example before and after an intervention."""
    target = torch.tensor([value for example in examples for value in example.target], device=before.device)
    distribution = task.distribution
    # Every target as a row of its own: the mean over those of an answer is taken below, in float64.
    each = torch.arange(len(target), device=before.device)
    columns: list[list[Any]] = [
        column.tolist()
        for column in (
            distribution.correct(before, target),
            distribution.correct(after, target),
            distribution.unchanged(before, after),
            distribution.log_prob(before, target),
            distribution.log_prob(after, target),
            distribution.divergence(before, after, each, len(target)),
            *([ranks(after, target)] if distribution.discrete else []),
        )
    ]
    correct_before, correct, unchanged, log_p_before, log_p, divergence, *rank = columns
    start = 0
    for example in examples:
        end = start + len(example.target)
        body = start + body_length(task, example.target)
        yield Measurement(
            correct_before=tuple(correct_before[start:end]),
            correct=tuple(correct[start:end]),
            unchanged=tuple(unchanged[start:end]),
            log_p_before=math.fsum(log_p_before[start:body]),
            log_p=math.fsum(log_p[start:body]),
            rank=rank[0][start] if rank else None,
            divergence=math.fsum(divergence[start:end]) / len(example.target),
        )
        start = end


def ranks(logits: Float[Tensor, "token vocabulary"], target: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    """Return the rank of each target among all classes by probability, 1 for the most probable.

    Classes that are as probable as the target rank before it.
    """
    return (logits >= logits.gather(1, target[:, None])).sum(-1)


def body_length(task: Task, answer: Answer) -> int:
    """Return the number of tokens of an answer before its end token."""
    return len(answer) - int(len(answer) > 0 and answer[-1] in task.end_tokens)


def _with_answers(
    task: Task, intervention: Intervention, measured: Sequence[Mapping[Query, Measurement]], max_new_tokens: int
) -> list[RequestMeasurements]:
    """Add the free answers after an intervention, if they are wanted, to what was measured for each request."""
    answers: list[dict[Prompt, Answer]] = [{} for _ in measured]
    if intervention.decode_answers:
        for by_query, of_request in zip(measured, answers, strict=True):
            of_request |= _known_answers(intervention, by_query)
        _decode_missing(intervention, measured, answers, max_new_tokens)
    asked = [
        [(query.prompt, query.expected, given[query.prompt]) for query in by_query if query.prompt in given]
        for by_query, given in zip(measured, answers, strict=True)
    ]
    continuations = measure_continuations(task, (item for of_request in asked for item in of_request))
    return [
        RequestMeasurements(by_query, given, {item: continuations[item] for item in items if item in continuations})
        for by_query, given, items in zip(measured, answers, asked, strict=True)
    ]


def _known_answers(intervention: Intervention, by_query: Mapping[Query, Measurement]) -> dict[Prompt, Answer]:
    """Return the free answers that need no decoding (see the module's docstring)."""
    task = intervention.task
    answers: dict[Prompt, Answer] = {}
    for query, measurement in by_query.items():
        if query.prompt in intervention.known_answers:
            answers[query.prompt] = intervention.known_answers[query.prompt]
        elif (
            task.distribution.discrete  # a number that is right within a tolerance does not tell the model's own
            and all(measurement.correct)
            and task.ends_answer(query.prompt)  # otherwise nothing is known of what follows
            and (not task.end_tokens or query.expected[-1] in task.end_tokens)
        ):
            answers[query.prompt] = query.expected
    return answers


def _decode_missing(
    intervention: Intervention,
    measured: Sequence[Mapping[Query, Measurement]],
    answers: Sequence[dict[Prompt, Answer]],
    max_new_tokens: int,
) -> None:
    """Decode the answers to the prompts that have none yet, and add them."""
    task = intervention.task
    missing: dict[int, list[tuple[int, Prompt, Prompt]]] = {}
    for number, (by_query, of_request) in enumerate(zip(measured, answers, strict=True)):
        for prompt in dict.fromkeys(query.prompt for query in by_query):
            edited_prompt = None if prompt in of_request else intervention.prompt_for(number, prompt, MIN_ANSWER_ROOM)
            if edited_prompt is not None:
                # Prompts of one length are decoded together, so that row i is request i's and nothing is padded.
                length = len(task.encode_input(edited_prompt)) if task.reads_text else 0
                missing.setdefault(length, []).append((number, prompt, edited_prompt))
    for group in missing.values():
        for start in range(0, len(group), MEASURE_BATCH_SIZE):
            chunk = group[start : start + MEASURE_BATCH_SIZE]
            with intervention.applied([number for number, _, _ in chunk]):
                decoded = task.predict([edited_prompt for _, _, edited_prompt in chunk], max_new_tokens, len(chunk))
            for (number, prompt, _), answer in zip(chunk, decoded, strict=True):
                answers[number][prompt] = answer
