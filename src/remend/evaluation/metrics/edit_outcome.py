"""``EditOutcome``: what one edit did at every prompt of its request. Metrics are functions of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from remend.editors.context_edit import fit_context, prepend_fact
from remend.evaluation.continuations import Continuation
from remend.evaluation.metrics.query_measurements import (
    MIN_ANSWER_ROOM,
    Measurement,
    Query,
    RequestMeasurements,
    body_length,
)
from remend.evaluation.metrics.word_overlap import contains, token_f1
from remend.evaluation.ordinary_text import Elsewhere
from remend.request import Chat, EditRequest, Probe, Prompt
from remend.tasks.base import Answer, Task

VALUE = "value"
"""The mode of a metric that has one value only."""

ModeScores = Mapping[str, float]
"""Mode → value: how one prompt is scored. Empty where the prompt could not be given to the model."""


@dataclass(frozen=True)
class PromptScore:
    """The values of a metric at one prompt.

    Attributes:
        values: mode → value; empty where the prompt could not be given to the model, which then counts nowhere.
        kind: a kind of prompt by which the metric is reported too, or nothing.
    """

    values: ModeScores
    kind: str = ""


@dataclass(frozen=True, eq=False)
class EditOutcome:
    """A request with what was measured before and after its edit.

    Attributes:
        task: the base model.
        request: the request.
        measurements: what was measured at its prompts.
        base_answers: the unedited model's free answer to every prompt.
        elsewhere: what the edit changes on ordinary text; None where it was not measured.
        singled_out: whether the edit's numbers single out its subject among decoys; None where that was not measured.
    """

    task: Task
    request: EditRequest
    measurements: RequestMeasurements
    base_answers: Mapping[Prompt, Answer] = field(repr=False)
    elsewhere: Elsewhere | None = None
    singled_out: bool | None = None

    # -- queries -------------------------------------------------------------------------------------------------

    def query(self, prompt: Prompt) -> Query:
        """Return the query of a prompt along the request's target."""
        return Query(prompt, self.task.encode(prompt, self.request.target).target)

    @cached_property
    def target_query(self) -> Query:
        """The query of the edited prompt along its target."""
        return self.query(self.request.prompt)

    def probe_query(self, probe: Probe) -> Query:
        """Return the query of a probe along the probe's own target."""
        return Query(probe.prompt, self.task.encode(probe.prompt, probe.target).target)

    def base_query(self, prompt: Prompt) -> Query:
        """Return the query of a prompt along the unedited model's answer, as far as it counts."""
        return base_query(self.task, prompt, self.base_answers)

    def adversarial_prompts(self) -> list[Prompt]:
        """Return the unrelated prompts with the edit before them, as far as they fit into the model's context."""
        return adversarial_prompts(self.task, self.request)

    # -- what was measured ---------------------------------------------------------------------------------------

    def measurement(self, query: Query) -> Measurement | None:
        """Return what was measured along an answer; None where the model could not be given the prompt."""
        return self.measurements.by_query.get(query)

    def base_answer(self, prompt: Prompt) -> Answer:
        """Return the unedited model's free answer."""
        return self.base_answers[prompt]

    def answer(self, prompt: Prompt) -> Answer | None:
        """Return the edited model's free answer; None where it was not decoded."""
        return self.measurements.answers.get(prompt)

    def body_length(self, answer: Answer) -> int:
        """Return the number of tokens of an answer before its end token."""
        return body_length(self.task, answer)

    def continuation(self, query: Query, answer: Answer) -> Continuation | None:
        """Return how an answer goes on after the expected one, where the model does not end its answers."""
        return self.measurements.continuations.get((query.prompt, query.expected, answer))

    # -- scores of one prompt ------------------------------------------------------------------------------------

    def correctness(self, query: Query) -> ModeScores:
        """Score whether the expected answer is given: along it, without regard to its end, and freely."""
        measurement = self.measurement(query)
        if measurement is None:
            return {}
        correct = measurement.correct[: self.body_length(query.expected)]
        # The end token is left out: whether the answer stops there is what free answers tell.
        share = sum(correct) / len(correct) if correct else 1.0
        return {"teacher_forced": float(share == 1), "token_accuracy": share, **self._free_answer_scores(query)}

    def unchanged(self, prompt: Prompt, along: Query) -> ModeScores:
        """Score whether the unedited model's answer stays; an empty one never does (:meth:`Task.same_answer`).

        Args:
            prompt: the prompt.
            along: the query whose expected answer is given while first choices are compared.
        """
        measurement = self.measurement(along)
        if measurement is None:
            return {}
        unchanged = all(measurement.unchanged[: self.body_length(along.expected)])
        forced = float(unchanged and not self.task.is_empty(along.expected))
        return {"teacher_forced": forced, **self._free_answer_scores(self.base_query(prompt))}

    def matches(self, query: Query, answer: Answer) -> float:
        """Return 1 if a free answer is the expected one (:meth:`Task.gives`) and goes on sensibly, else 0.

        A continuation that was not measured, as the unedited model's own, counts as sensible.
        """
        continuation = self.continuation(query, answer)
        sensible = continuation is None or continuation.sensible
        return float(sensible and self.task.gives(query.prompt, answer, query.expected))

    def _free_answer_scores(self, query: Query) -> ModeScores:
        answer = self.answer(query.prompt)
        if answer is None:
            # Greedy decoding gives the expected answer exactly if it is the first choice all along.
            measurement = self.measurements.by_query[query]
            return {"generated": float(all(measurement.correct) and not self.task.is_empty(query.expected))}
        generated = {"generated": self.matches(query, answer)}
        if not self.task.distribution.discrete:  # words and their overlap mean nothing for numbers
            return generated
        text, expected = self.task.decode(self._comparable(query, answer)), self.task.decode(query.expected)
        return {**generated, "contains": contains(text, expected), "token_f1": token_f1(text, expected)}

    def _comparable(self, query: Query, answer: Answer) -> Answer:
        """Return a free answer, cut to the expected length where the model goes on writing."""
        return answer if self.task.ends_answer(query.prompt) else answer[: len(query.expected)]


def base_query(task: Task, prompt: Prompt, base_answers: Mapping[Prompt, Answer]) -> Query:
    """Return the query of a prompt along the part of the unedited model's answer that must stay."""
    return Query(prompt, task.answer_span(prompt, base_answers[prompt]))


def adversarial_prompts(task: Task, request: EditRequest) -> list[Prompt]:
    """Return unrelated prompts with the edit put before them as a sentence (Hoelscher-Obermaier et al., 2305.17553).

    A model that answers them with the edit's target is led by the words of the edit, not by the question. Those that do
    not fit into the model's context are left out.
    """
    prompts = (fit_context(task, prepend_fact(request, probe.prompt), MIN_ANSWER_ROOM) for probe in request.locality)
    return [prompt for prompt in prompts if prompt is not None]


def kind_of(probe: Probe) -> str:
    """Return the kind that a probe says it is of, or nothing."""
    kind = (probe.model_extra or {}).get("kind")
    return kind if isinstance(kind, str) else ""


def prompt_form(prompt: Prompt) -> str:
    """Return the form of a prompt: ``chat``, ``question`` or ``completion``."""
    if isinstance(prompt, Chat):
        return "chat"
    return "question" if str(prompt).rstrip().endswith(("?", "？", "؟")) else "completion"
