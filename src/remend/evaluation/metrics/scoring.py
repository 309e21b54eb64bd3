"""What an edit's request asks of it, and the value of each metric that follows from what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from remend.editors.in_context import after_fact, fitting
from remend.errors import prefix_request_errors
from remend.evaluation.before_after import Answer
from remend.evaluation.metrics.functions import (
    contains,
    exact_match,
    ngram_entropy,
    repetition,
    token_accuracy,
    token_f1,
)
from remend.evaluation.metrics.measure import SHORT, Measurements, Query, body_length
from remend.request import Chat, EditRequest, Probe, Prompt
from remend.tasks.base import Task

T = TypeVar("T")
Values = dict[str, dict[str, float]]
"""Metric → mode → value."""

VALUE = "value"
"""The one mode of a metric that has no teacher-forced and generated side."""


class Scorer:
    """Knows which prompts belong to a request and what is wanted there, and values what was seen.

    Args:
        task: the base model.
        requests: all that will be judged.
        limit: how many tokens a free answer may have.
    """

    def __init__(self, task: Task, requests: Sequence[EditRequest], limit: int = 32) -> None:
        self.task = task
        self.limit = limit
        prompts: dict[Prompt, None] = {}
        for number, request in enumerate(requests):
            with prefix_request_errors(str(request.id) if request.id is not None else f"request {number}"):
                self._targets(request, (request.prompt, *_phrasings(request)))
                prompts |= dict.fromkeys(self._every(request))
        self.own = dict(zip(prompts, task.predict(list(prompts), limit), strict=True))
        """The unedited model's free answer to every prompt."""

    def questions(self, request: EditRequest) -> list[Query]:
        """All that is looked at for a request: each prompt along what is wanted there."""
        found = self._targets(request, (request.prompt, *_phrasings(request)))
        found += [self._given(probe) for probe in (*request.portability, *request.locality, *request.near)]
        kept = [probe.prompt for probe in (*request.locality, *request.near)]
        found += map(
            self.own_question,
            (request.prompt, *kept, *self.adversarial(request), *request.negated, *request.generation),
        )
        return list(dict.fromkeys(found))

    def target_length(self, request: EditRequest) -> int:
        """How many tokens the target has, without its end."""
        (asked,) = self._targets(request, (request.prompt,))
        return body_length(self.task, asked.expected)

    def adversarial(self, request: EditRequest) -> list[Prompt]:
        """Unrelated prompts with the edit put before them as a sentence (Hoelscher-Obermaier et al., 2305.17553).

        A model that answers them with the edit's target listens to the words of the edit, not to the question. Those
        that do not fit into the model's context are left out.
        """
        found = (fitting(self.task, after_fact(request, probe.prompt), SHORT) for probe in request.locality)
        return [prompt for prompt in found if prompt is not None]

    # -- values --------------------------------------------------------------------------------------------------

    def values(self, request: EditRequest, view: Measurements) -> Values:
        """Every metric that the request has data for, by mode; what could not be asked is absent, never 0."""
        asked, phrased, formats = (
            self._targets(request, own) for own in ((request.prompt,), request.paraphrases, request.formats)
        )
        wanted = {
            "reliability": asked,
            "generality": phrased,
            "generality_unseen": self._targets(request, request.unseen_paraphrases),
            "edit_success": [*asked, *phrased],
            **_by_kind("portability", [(kind_of(probe), self._given(probe)) for probe in request.portability]),
            **_by_kind("format_shift", [(form_of(question.prompt), question) for question in formats]),
        }
        kept = {
            "far": [(probe.prompt, self._given(probe)) for probe in request.locality],
            **_by_kind("near", [(kind_of(probe), (probe.prompt, self._given(probe))) for probe in request.near]),
            "adversarial": [(prompt, self.own_question(prompt)) for prompt in self.adversarial(request)],
        }
        found: Values = {name: _mean(self._right(question, view) for question in own) for name, own in wanted.items()}
        for name, places in kept.items():
            found[f"locality_{name}"] = _mean(self._kept(prompt, along, view) for prompt, along in places)
            found[f"kl_{name}"] = _mean(self._divergence(prompt, view) for prompt, _ in places)
        found["accuracy_drawdown"] = _mean(self._lost(probe, view) for probe in request.locality)
        found["portability_negated"] = _mean(self._denied(request, prompt, view) for prompt in request.negated)
        found |= self._confidence(asked[0], view)
        found |= self._fluency(request, view)
        return {name: values for name, values in found.items() if values}

    def _right(self, question: Query, view: Measurements) -> dict[str, float]:
        """Whether an answer is given: along it, without regard to its end, and freely."""
        seen = view.seen.get(question)
        if seen is None:
            return {}
        body = body_length(self.task, question.expected)
        share = token_accuracy(seen.after[:body], question.expected[:body])
        return {"teacher_forced": float(share == 1), "token_accuracy": share, **self._freely(question, view)}

    def _kept(self, prompt: Prompt, along: Query, view: Measurements) -> dict[str, float]:
        """Whether the unedited model's answer stayed: its first choices ``along`` an answer, and freely its own."""
        seen = view.seen.get(along)
        if seen is None:
            return {}
        body = body_length(self.task, along.expected)
        forced = float(seen.before[:body] == seen.after[:body])
        return {"teacher_forced": forced, **self._freely(self.own_question(prompt), view)}

    def _freely(self, question: Query, view: Measurements) -> dict[str, float]:
        """How the free answer compares with what was looked for; where it was not decoded, whether it is the same."""
        if question.prompt not in view.answers:
            return {"generated": float(view.seen[question].after == question.expected)}
        wanted, answer = self.task.decode(question.expected), self._told(question, view.answers[question.prompt])
        return {
            "generated": exact_match(answer, wanted),
            "contains": contains(answer, wanted),
            "token_f1": token_f1(answer, wanted),
        }

    def _told(self, question: Query, answer: tuple[int, ...]) -> str:
        """A free answer's text. Where nothing ends answers, it is as long as what was looked for."""
        return self.task.decode(answer if self.task.end_tokens else answer[: len(question.expected)])

    def _divergence(self, prompt: Prompt, view: Measurements) -> dict[str, float]:
        seen = view.seen.get(self.own_question(prompt))
        return {} if seen is None else {VALUE: seen.divergence}

    def _lost(self, probe: Probe, view: Measurements) -> dict[str, float]:
        """1 where the true answer was given before and is not any more, −1 where it is the other way round."""
        question = self._given(probe)
        seen = view.seen.get(question)
        if seen is None:
            return {}
        body, expected = body_length(self.task, question.expected), question.expected
        forced = float(seen.before[:body] == expected[:body]) - float(seen.after[:body] == expected[:body])
        if probe.prompt in view.answers:
            answers = (self.own[probe.prompt], view.answers[probe.prompt])
            was, now = (exact_match(self._told(question, own), self.task.decode(expected)) for own in answers)
        else:
            was, now = (float(own == expected) for own in (seen.before, seen.after))
        return {"teacher_forced": forced, "generated": was - now}

    def _denied(self, request: EditRequest, prompt: Prompt, view: Measurements) -> dict[str, float]:
        """1 where a prompt that denies the fact is not answered with it."""
        answer = view.answers.get(prompt)
        return {} if answer is None else {VALUE: 1 - contains(self.task.decode(answer), request.target)}

    def _confidence(self, question: Query, view: Measurements) -> Values:
        """The probability of the target, and its first token's rank."""
        seen = view.seen.get(question)
        if seen is None:
            return {}
        return {
            "target_probability": {VALUE: math.exp(seen.log_p)},
            "target_rank": {VALUE: float(seen.rank)},
        }

    def _fluency(self, request: EditRequest, view: Measurements) -> Values:
        """How varied free continuations are."""
        answers = [view.answers[prompt] for prompt in request.generation if prompt in view.answers]
        told = [answer[: body_length(self.task, answer)] for answer in answers]
        return {
            "fluency": _mean({VALUE: ngram_entropy(answer)} for answer in told),
            "repetition": _mean({VALUE: repetition(answer)} for answer in told),
        }

    # -- for people ----------------------------------------------------------------------------------------------

    def answers(self, request: EditRequest, view: Measurements) -> list[Answer]:
        """Every prompt's answer before and after the change, in words."""
        target, text = request.target, self.task.decode
        rows: list[tuple[str, Prompt, str | None]] = [("prompt", request.prompt, target)]
        rows += [("paraphrase", prompt, target) for prompt in request.paraphrases]
        rows += [("unseen paraphrase", prompt, target) for prompt in request.unseen_paraphrases]
        rows += [(f"as a {form_of(prompt)}", prompt, target) for prompt in request.formats]
        rows += [(kind_of(probe) or "portability", probe.prompt, probe.target) for probe in request.portability]
        rows += [("negated", prompt, None) for prompt in request.negated]
        for kind, probes in (("near", request.near), ("far", request.locality)):
            rows += [(kind, probe.prompt, text(self.own[probe.prompt])) for probe in probes]
        rows += [("adversarial", prompt, text(self.own[prompt])) for prompt in self.adversarial(request)]
        rows += [("generation", prompt, None) for prompt in request.generation]
        return [
            Answer(kind, str(prompt), wanted, text(self.own[prompt]), *self._after(kind, prompt, wanted, request, view))
            for kind, prompt, wanted in rows
            if prompt in view.answers
        ]

    def _after(
        self, kind: str, prompt: Prompt, wanted: str | None, request: EditRequest, view: Measurements
    ) -> tuple[str, bool | None]:
        after = self.task.decode(view.answers[prompt])
        if kind == "negated":
            return after, not contains(after, request.target)
        if wanted is None:
            return after, None
        asked = self.own_question(prompt) if kind in KEPT else Query(prompt, self.task.encode(prompt, wanted).target)
        return after, bool(exact_match(self._told(asked, view.answers[prompt]), self.task.decode(asked.expected)))

    # -- questions -----------------------------------------------------------------------------------------------

    def _targets(self, request: EditRequest, prompts: Iterable[Prompt]) -> list[Query]:
        return [Query(prompt, self.task.encode(prompt, request.target).target) for prompt in prompts]

    def _given(self, probe: Probe) -> Query:
        return Query(probe.prompt, self.task.encode(probe.prompt, probe.target).target)

    def own_question(self, prompt: Prompt) -> Query:
        """A prompt, along the unedited model's own answer."""
        return Query(prompt, self.own[prompt])

    def _every(self, request: EditRequest) -> list[Prompt]:
        probes = (*request.portability, *request.locality, *request.near)
        own = (request.prompt, *_phrasings(request), *request.negated, *request.generation)
        return [*own, *(probe.prompt for probe in probes), *self.adversarial(request)]


KEPT = ("near", "far", "adversarial")
"""The kinds of prompt whose answer must stay."""


def kind_of(probe: Probe) -> str:
    """The kind that a probe says it is of, or nothing."""
    kind = (probe.model_extra or {}).get("kind")
    return kind if isinstance(kind, str) else ""


def form_of(prompt: Prompt) -> str:
    """``chat``, ``question`` or ``completion``: how a prompt asks."""
    if isinstance(prompt, Chat):
        return "chat"
    return "question" if str(prompt).rstrip().endswith(("?", "？", "؟")) else "completion"


def _phrasings(request: EditRequest) -> tuple[Prompt, ...]:
    return (*request.paraphrases, *request.unseen_paraphrases, *request.formats)


def _by_kind(name: str, places: Sequence[tuple[str, T]]) -> dict[str, list[T]]:
    """All places under ``name``, and those of each kind under ``name_kind``."""
    found: dict[str, list[T]] = {name: [place for _, place in places]}
    for kind, place in places:
        if kind:
            found.setdefault(f"{name}_{kind}", []).append(place)
    return found


def _mean(several: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each mode over the places where something was found; of none, nothing."""
    found = [values for values in several if values]
    return {mode: math.fsum(values[mode] for values in found) / len(found) for mode in found[0]} if found else {}
