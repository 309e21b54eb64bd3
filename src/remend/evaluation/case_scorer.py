"""``CaseScorer``: makes the cases of a report, which hold what an intervention did to one request."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from remend.edit import Edit
from remend.editors.context_edit import ContextEdit
from remend.editors.edit_types import AnyEdit
from remend.errors import ConfigError
from remend.evaluation.interventions import (
    FactsInContext,
    Intervention,
    NoIntervention,
    SeparateEdits,
    shared_intervention,
)
from remend.evaluation.metrics.query_measurements import RequestMeasurements, measure
from remend.evaluation.metrics.scorer import Scorer
from remend.evaluation.ordinary_text import Elsewhere, OrdinaryText
from remend.evaluation.perturbed_edits import PERTURBATIONS
from remend.evaluation.readability import DECOYS, singles_out
from remend.evaluation.reports.report import Case
from remend.request import EditRequest
from remend.tasks.base import Task

BASELINES = ("unedited", "in_context")
"""What edits are compared with: the model as it is, and with the fact in its prompt."""


class CaseScorer:
    """Measures requests after interventions, and makes a case of each.

    Args:
        task: the unedited model.
        scorer: computes the metrics.
        text: the ordinary text on which edits are measured, if they are.
    """

    def __init__(self, task: Task, scorer: Scorer, text: OrdinaryText | None) -> None:
        self.task, self.scorer, self.text = task, scorer, text

    def score_separately(
        self,
        requests: Sequence[EditRequest],
        start: int,
        edits: Sequence[AnyEdit],
        strengths: Iterable[float],
        baselines: bool,
        perturbed: bool,
    ) -> list[list[Case]]:
        """Return the cases of each request's edit at each strength, then of the baselines, then perturbed.

        Edits of weights or units are measured in one pass, others, which cannot be perturbed, one after the other.
        """
        low_rank = [edit for edit in edits if isinstance(edit, Edit)]
        if len(low_rank) == len(edits):
            # Free answers are decoded at full strength only: decoding takes most of the time.
            interventions: list[Intervention] = [
                SeparateEdits(self.task, low_rank, strength, decode_answers=strength == 1, on_text=strength == 1)
                for strength in strengths
            ]
            interventions += self.baseline_interventions(requests) if baselines else []
            for perturb in PERTURBATIONS.values() if perturbed else ():
                inexact = [perturb(edit, start + index) for index, edit in enumerate(low_rank)]
                interventions.append(SeparateEdits(self.task, inexact, on_text=False))
            singled_out = self._singled_out(requests, low_rank) if perturbed else ()
            return self.score(requests, start, interventions, singled_out)
        # Other edits change the whole model or its prompts, so that each needs a pass of its own.
        if list(strengths) != [1.0]:
            raise ConfigError(f"a {type(edits[0]).__name__} has no strength: omit the strengths (--no-frontier)")
        if perturbed:
            raise ConfigError(f"a {type(edits[0]).__name__} has no numbers that could be inexact: omit perturbed")
        rows = []
        for index, (request, edit) in enumerate(zip(requests, edits, strict=True)):
            interventions = [shared_intervention(self.task, edit, 1)]
            interventions += self.baseline_interventions([request]) if baselines else []
            rows.append(self.score([request], start + index, interventions))
        # From one list for each request to one for each intervention.
        return [[case for cases in column for case in cases] for column in zip(*rows, strict=True)]

    def score(
        self,
        requests: Sequence[EditRequest],
        start: int,
        interventions: Sequence[Intervention],
        singled_out: Sequence[bool | None] = (),
    ) -> list[list[Case]]:
        """Return the cases after each intervention.

        Args:
            requests: the requests.
            start: the number of the first one, for those that have no id.
            interventions: what is measured.
            singled_out: whether the numbers of each request's edit single out its subject, for the first intervention.
        """
        queries = [self.scorer.queries(request) for request in requests]
        measured = measure(self.task, interventions, queries, self.scorer.max_new_tokens)
        unknown: list[bool | None] = [None] * len(requests)
        listed = [singled_out or unknown, *[unknown] * (len(interventions) - 1)]
        return [
            [
                self._case(request, start + index, measurements, elsewhere, found)
                for index, (request, measurements, elsewhere, found) in enumerate(
                    zip(requests, by_request, self._elsewhere(intervention, len(requests)), of_edits, strict=True)
                )
            ]
            for intervention, by_request, of_edits in zip(interventions, measured, listed, strict=True)
        ]

    def _singled_out(self, requests: Sequence[EditRequest], edits: Sequence[Edit]) -> list[bool | None]:
        """Return whether each edit's numbers single out its subject among those of other requests, where they can."""
        found: list[bool | None] = []
        for request, edit in zip(requests, edits, strict=True):
            others = [subject for subject in self.scorer.subjects if subject != request.subject]
            if not request.subject or len(others) < DECOYS:
                found.append(None)
            else:
                decoys = random.Random(request.subject).sample(others, DECOYS)
                found.append(singles_out(self.task, edit, request.subject, decoys))
        return found

    def _elsewhere(self, intervention: Intervention, requests: int) -> list[Elsewhere | None]:
        """Measure what each request's edit changes on ordinary text, where there is some."""
        if self.text is None or not intervention.on_text:
            return [None] * requests
        measured: list[Elsewhere | None] = []
        measured += self.text.measure(intervention, requests if isinstance(intervention, SeparateEdits) else 1)
        # An edit that requests share is measured once, and enters the mean over requests once.
        return measured + [None] * (requests - len(measured))

    def _case(
        self,
        request: EditRequest,
        number: int,
        measurements: RequestMeasurements,
        elsewhere: Elsewhere | None,
        singled_out: bool | None,
    ) -> Case:
        scorer = self.scorer
        about: dict[str, str | float] = {"target_tokens": scorer.target_length(request)}
        if isinstance(relation := (request.model_extra or {}).get("relation"), str):
            about["relation"] = relation
        base = measurements.by_query.get(scorer.base_query(request.prompt))
        if base is not None:  # another intervention may leave no room for the prompt
            about["confidence"] = math.exp(base.log_p_before)
        return Case(
            id=request.id if request.id is not None else number,
            prompt=str(request.prompt),
            target=request.target,
            before=self.task.decode(scorer.base_answers[request.prompt]),
            values=scorer.values(request, measurements, elsewhere, singled_out),
            about=about,
            answers=scorer.answers(request, measurements),
            intervals={} if elsewhere is None else elsewhere.intervals,
        )

    def baseline_interventions(self, requests: Sequence[EditRequest]) -> list[Intervention]:
        """Return the interventions of :data:`BASELINES`."""
        facts = [ContextEdit((request,)) for request in requests]
        return [NoIntervention(self.task, self.scorer.base_answers), FactsInContext(self.task, facts)]
