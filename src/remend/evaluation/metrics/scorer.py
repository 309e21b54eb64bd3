"""``Scorer``: from edit requests to the queries that are measured, and from the measurements to values of metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from remend.errors import RegistryError, nearest, prefix_request_errors
from remend.evaluation.before_after import AnswerComparison
from remend.evaluation.metrics.edit_outcome import (
    EditOutcome,
    ModeScores,
    PromptScore,
    adversarial_prompts,
    base_query,
    kind_of,
    prompt_form,
)
from remend.evaluation.metrics.query_measurements import Query, RequestMeasurements, body_length
from remend.evaluation.metrics.word_overlap import contains
from remend.evaluation.ordinary_text import Elsewhere
from remend.registries import METRICS, Metric
from remend.request import EditRequest, Prompt
from remend.tasks.base import Answer, Task
from remend.tasks.unknown_text import warn_of_unknown_text

MetricFunction = Callable[[EditOutcome], Iterable[PromptScore]]

MetricValues = dict[str, dict[str, float]]
"""Metric → mode → value."""

MUST_STAY = ("near", "far", "adversarial")
"""The kinds of prompt whose answer must stay."""


class Scorer:
    """Knows the queries of each request, and computes the metrics of what was measured.

    Args:
        task: the base model.
        requests: all requests that will be scored.
        max_new_tokens: the longest free answer.
        metrics: names of metrics; by default all that are registered and suit the task.

    Attributes:
        base_answers: the unedited model's free answer to every prompt.
        subjects: what the requests are about, each once, where they say it.

    Raises:
        RequestError: a request does not fit the model.
    """

    def __init__(
        self,
        task: Task,
        requests: Sequence[EditRequest],
        max_new_tokens: int = 32,
        metrics: Sequence[str] | None = None,
    ) -> None:
        self.task = task
        self.max_new_tokens = max_new_tokens
        entries = [METRICS.get(name) for name in (METRICS.names() if metrics is None else metrics)]
        self._metrics: list[tuple[Metric, MetricFunction]] = [
            (entry, METRICS.load(entry.name)) for entry in entries if _suits(entry, task)
        ]
        self.subjects = list(dict.fromkeys(request.subject for request in requests if request.subject))
        prompts: dict[Prompt, None] = {}
        task.choose_answer_forms(prompt for request in requests for prompt in self._prompts(request))
        for number, request in enumerate(requests, start=1):
            # Encoding everything first names the request that does not fit before any edit is made.
            with prefix_request_errors(str(request.id) if request.id is not None else f"request {number}"):
                self._target_queries(request)
                prompts |= dict.fromkeys(self._prompts(request))
        warn_of_unknown_text(task, prompts, "the requests' prompts")
        # Decoded once for all requests: many share their probes, and every evaluation compares with these answers.
        self.base_answers: dict[Prompt, Answer] = dict(
            zip(prompts, task.predict(list(prompts), max_new_tokens), strict=True)
        )

    # -- queries -------------------------------------------------------------------------------------------------

    def queries(self, request: EditRequest) -> list[Query]:
        """Return every query of a request: its prompts along the answers that are expected there."""
        outcome = self._outcome(request, RequestMeasurements({}, {}))
        queries = self._target_queries(request)
        probes = (*request.locality, *request.near)
        queries += [outcome.probe_query(probe) for probe in (*request.portability, *probes)]
        queries += map(
            self.base_query,
            (
                request.prompt,
                *(probe.prompt for probe in probes),
                *adversarial_prompts(self.task, request),
                *request.negated,
                *(probe.prompt for probe in request.outdated),
                *request.generation,
            ),
        )
        return list(dict.fromkeys(queries))  # targets often are the model's own answers: the same query twice

    def base_query(self, prompt: Prompt) -> Query:
        """Return the query of a prompt along the unedited model's answer, as far as it counts."""
        return base_query(self.task, prompt, self.base_answers)

    def target_length(self, request: EditRequest) -> int:
        """Return the number of tokens of a request's target, without its end token."""
        return body_length(self.task, self.task.encode(request.prompt, request.target).target)

    def _target_queries(self, request: EditRequest) -> list[Query]:
        prompts = (request.prompt, *request.paraphrases, *request.unseen_paraphrases, *request.formats)
        return [Query(prompt, self.task.encode(prompt, request.target).target) for prompt in prompts]

    def _prompts(self, request: EditRequest) -> list[Prompt]:
        """Return every prompt that is given to the model for a request."""
        prompts: list[Prompt] = [request.prompt, *request.paraphrases, *request.unseen_paraphrases, *request.formats]
        prompts += [*request.negated, *request.generation]
        probes = (*request.portability, *request.outdated, *request.locality, *request.near)
        prompts += [probe.prompt for probe in probes]
        return prompts + adversarial_prompts(self.task, request)

    # -- values --------------------------------------------------------------------------------------------------

    def values(
        self,
        request: EditRequest,
        measurements: RequestMeasurements,
        elsewhere: Elsewhere | None = None,
        singled_out: bool | None = None,
    ) -> MetricValues:
        """Compute every metric that the request has data for, by mode, and by kind where its prompts have kinds.

        A metric without data is absent, never 0.

        Args:
            request: the request.
            measurements: what was measured for it.
            elsewhere: what its edit changes on ordinary text, where it was measured.
            singled_out: whether its edit's numbers single out its subject, where that was measured.

        Raises:
            RegistryError: a metric gives a value of a mode that its registry entry does not list.
        """
        outcome = self._outcome(request, measurements, elsewhere, singled_out)
        values: MetricValues = {}
        for entry, metric in self._metrics:
            if entry.fields and not any(getattr(request, name, ()) for name in entry.fields):
                continue
            by_kind: dict[str, list[ModeScores]] = {"": []}  # the empty kind is of all prompts
            for score in metric(outcome):
                # `remend compare` and the tables find modes by the registry; a mode that it lacks would never be shown.
                if unknown := [mode for mode in score.values if mode not in entry.modes]:
                    raise RegistryError(
                        f"the metric {entry.name!r} gives a value of the mode {unknown[0]!r}, which its registry entry "
                        f"does not list; {nearest(unknown[0], entry.modes)}"
                    )
                by_kind[""].append(score.values)
                if score.kind:
                    by_kind.setdefault(score.kind, []).append(score.values)
            for kind, scores in by_kind.items():
                if means := _mean_by_mode(scores):
                    values[f"{entry.name}_{kind}" if kind else entry.name] = means
        return values

    def _outcome(
        self,
        request: EditRequest,
        measurements: RequestMeasurements,
        elsewhere: Elsewhere | None = None,
        singled_out: bool | None = None,
    ) -> EditOutcome:
        return EditOutcome(self.task, request, measurements, self.base_answers, elsewhere, singled_out)

    # -- answers in words ----------------------------------------------------------------------------------------

    def answers(self, request: EditRequest, measurements: RequestMeasurements) -> list[AnswerComparison]:
        """Return the answer to each prompt before and after the edit, in words."""
        target, decode = request.target, self.task.decode
        rows: list[tuple[str, Prompt, str | None]] = [("prompt", request.prompt, target)]
        rows += [("paraphrase", prompt, target) for prompt in request.paraphrases]
        rows += [("unseen paraphrase", prompt, target) for prompt in request.unseen_paraphrases]
        rows += [(f"as a {prompt_form(prompt)}", prompt, target) for prompt in request.formats]
        rows += [(kind_of(probe) or "portability", probe.prompt, probe.target) for probe in request.portability]
        rows += [("negated", prompt, None) for prompt in request.negated]
        rows += [("outdated", probe.prompt, None) for probe in request.outdated]
        for kind, probes in (("near", request.near), ("far", request.locality)):
            rows += [(kind, probe.prompt, decode(self.base_answers[probe.prompt])) for probe in probes]
        adversarial = adversarial_prompts(self.task, request)
        rows += [("adversarial", prompt, decode(self.base_answers[prompt])) for prompt in adversarial]
        rows += [("generation", prompt, None) for prompt in request.generation]
        outcome = self._outcome(request, measurements)
        return [
            AnswerComparison(
                kind=kind,
                prompt=str(prompt),
                wanted=expected,
                before=decode(self.base_answers[prompt]),
                after=decode(answer),
                ok=self._is_right(kind, prompt, expected, answer, outcome),
            )
            for kind, prompt, expected in rows
            if (answer := measurements.answers.get(prompt)) is not None
        ]

    def _is_right(
        self, kind: str, prompt: Prompt, expected: str | None, answer: Answer, outcome: EditOutcome
    ) -> bool | None:
        """Tell whether the edited model's answer is right; None where no answer is expected."""
        if kind == "negated":
            return not contains(self.task.decode(answer), outcome.request.target)
        if kind == "outdated":
            old = [probe.target for probe in outcome.request.outdated if probe.prompt == prompt]
            return not any(contains(self.task.decode(answer), target) for target in old)
        if expected is None:
            return None
        if kind in MUST_STAY:
            query = self.base_query(prompt)
        else:
            query = Query(prompt, self.task.encode(prompt, expected).target)
        return bool(outcome.matches(query, answer))


def _suits(metric: Metric, task: Task) -> bool:
    """Tell whether a task has the outputs and answers that a metric needs."""
    return (task.distribution.discrete or not metric.discrete) and (task.generates or not metric.generates)


def _mean_by_mode(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each mode over the prompts that have values; empty if none has."""
    # math.fsum is exact, so that the mean does not depend on the order of prompts.
    scored = [values for values in scores if values]
    return {mode: math.fsum(values[mode] for values in scored) / len(scored) for mode in scored[0]} if scored else {}
