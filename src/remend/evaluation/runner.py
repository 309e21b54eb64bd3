"""``EvaluationRunner``: makes the edits of each protocol, measures them, and keeps finished parts in a checkpoint."""

from __future__ import annotations

import operator
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import ParamSpec, TypeVar

from remend.edit import Edit
from remend.editors.base import EditorLike
from remend.editors.context_edit import ContextEdit
from remend.editors.edit_types import AnyEdit
from remend.evaluation.abilities import AbilityPanel
from remend.evaluation.case_scorer import BASELINES, CaseScorer
from remend.evaluation.checkpoint import EvaluationCheckpoint
from remend.evaluation.conflicting_probes import filter_probes
from remend.evaluation.interventions import Intervention, SharedEdit, shared_intervention
from remend.evaluation.metrics.scorer import Scorer
from remend.evaluation.ordinary_text import OrdinaryText
from remend.evaluation.perturbed_edits import PERTURBATIONS
from remend.evaluation.reports.report import Case, Run, summaries_as_json, summaries_from_json
from remend.evaluation.summary import Summary
from remend.request import EditRequest
from remend.tasks.base import Task

REQUESTS_PER_PART = 32
"""Requests whose single edits are evaluated together and then stored; does not change the result."""

Part = tuple[float, list[list[Case]], dict[str, Summary]]
"""A finished part: the seconds that edits took, the cases after each intervention, and abilities."""

T = TypeVar("T")
P = ParamSpec("P")


class EvaluationRunner:
    """Evaluates an editor on requests, in each of the protocols.

    Args:
        task: the unedited model.
        editor: the editor; None where the edits were made already.
        requests: what to edit.
        scorer: computes the metrics.
        text: the ordinary text on which edits are measured, if they are.
        checkpoint: where finished parts are stored.
        on_progress: called with the number of edits that were evaluated.
        panel: the abilities that are measured with several edits applied, if they are.

    Attributes:
        left_out: how many requests or prompts were not evaluated, by reason.
        sequence: of sequential edits, all that were made so far, as one edit.
    """

    def __init__(
        self,
        task: Task,
        editor: EditorLike | None,
        requests: Sequence[EditRequest],
        scorer: Scorer,
        text: OrdinaryText | None,
        checkpoint: EvaluationCheckpoint,
        on_progress: Callable[[int], None],
        panel: AbilityPanel | None = None,
    ) -> None:
        self.task, self.requests = task, requests
        self._cases = CaseScorer(task, scorer, text)
        self._editor, self._panel = editor, panel
        self.text, self.checkpoint, self.on_progress = text, checkpoint, on_progress
        self.left_out: Counter[str] = Counter()
        self.sequence: AnyEdit | None = None

    @property
    def editor(self) -> EditorLike:
        """The editor, where there is one."""
        assert self._editor is not None
        return self._editor

    # -- protocols -----------------------------------------------------------------------------------------------

    def evaluate_single(
        self, strengths: Sequence[float], baselines: bool, perturbed: bool
    ) -> tuple[list[Run], dict[float, list[Case]], dict[str, list[Case]]]:
        """Evaluate each edit of the unedited model alone.

        Args:
            strengths: multiples of each edit that are evaluated too.
            baselines: whether to evaluate :data:`BASELINES` too.
            perturbed: whether to evaluate each edit with :data:`PERTURBATIONS` too.

        Returns:
            The run, the cases at each strength, and those of each baseline and perturbation.
        """
        all_strengths = dict.fromkeys((1.0, *strengths))
        others = [*(BASELINES if baselines else ()), *(PERTURBATIONS if perturbed else ())]
        names = (*all_strengths, *others)
        cases: dict[float | str, list[Case]] = {name: [] for name in names}
        total = 0.0
        for start in range(0, len(self.requests), REQUESTS_PER_PART):
            chunk = self.requests[start : start + REQUESTS_PER_PART]
            part = self._load_part(f"single-{start}")
            if part is None:
                seconds, edits = _timed(self.editor.edit_each, self.task, chunk)
                # All are measured in the same pass: the outputs before any edit are the same.
                scored = self._cases.score_separately(chunk, start, edits, all_strengths, baselines, perturbed)
                part = self._save_part(f"single-{start}", seconds, scored)
            total += part[0]
            # A part lists the cases in the order in which the interventions were given.
            for listed, new in zip(cases.values(), part[1], strict=True):
                listed += new
            self.on_progress(len(chunk))
        frontier = {strength: cases[strength] for strength in sorted(all_strengths)} if strengths else {}
        return [Run(1, cases[1.0], total / len(self.requests))], frontier, {name: cases[name] for name in others}

    def evaluate_batched(self, sizes: Sequence[int]) -> list[Run]:
        """Evaluate edits in batches of each of the sizes, all edits of a batch applied at once."""
        runs = []
        for size in sizes:
            # A smaller last batch would be another number of edits, whose results do not belong in this run.
            whole = len(self.requests) - len(self.requests) % size
            if rest := len(self.requests) - whole:
                self.left_out[f"requests that do not fill a batch of {size}"] += rest
            cases: list[Case] = []
            abilities: dict[str, Summary] = {}
            total = 0.0
            for start in range(0, whole, size):
                chunk = self.requests[start : start + size]
                filtered = self._filter_probes(chunk)
                part = self._load_part(f"batched-{size}-{start}")
                if part is None:
                    seconds, edit = _timed(self.editor.edit, self.task, chunk)
                    intervention = shared_intervention(self.task, edit, size)
                    scored = self._cases.score(filtered, start, [intervention])
                    last = start + size == whole  # one batch tells of the model's abilities
                    part = self._save_part(f"batched-{size}-{start}", seconds, scored, intervention if last else None)
                total += part[0]
                cases += part[1][0]
                abilities = part[2]
                self.on_progress(size)
            runs.append(Run(size, cases, total / whole, abilities))
        return runs

    def evaluate_sequential(self, sizes: Sequence[int]) -> list[Run]:
        """Make one edit after another, each of the model with all earlier ones; evaluate all so far at each size."""
        if unused := len(self.requests) - sizes[-1]:
            self.left_out["requests after the last edit"] += unused
        runs: list[Run] = []
        edit: AnyEdit | None = None
        done, total = 0, 0.0
        for size in sizes:
            filtered = self._filter_probes(self.requests[:size])
            part = self._load_part(f"after-{size}")
            if part is None:
                seconds, extended = _timed(self._extend_sequence, edit, done, size)
                # Stored before its part: a part that can be loaded always has an edit to go on from.
                self.checkpoint.save_edit(size, extended)
                intervention = shared_intervention(self.task, extended, size)
                scored = self._cases.score(filtered, 0, [intervention])
                edit = extended
                part = self._save_part(f"after-{size}", seconds, scored, intervention)
            else:
                edit = self.checkpoint.load_edit(size)
            total += part[0]
            runs.append(Run(size, part[1][0], total / size, part[2]))
            self.on_progress(size - done)
            done = size
        self.sequence = edit
        return runs

    def evaluate_checkpoint(self, edited: Task) -> list[Run]:
        """Evaluate another checkpoint, in which the edits of all requests are applied."""
        cases: list[Case] = []
        for start in range(0, len(self.requests), REQUESTS_PER_PART):
            chunk = self.requests[start : start + REQUESTS_PER_PART]
            cases += self._cases.score(chunk, start, [Intervention(edited)])[0]
            self.on_progress(len(chunk))
        return [Run(len(self.requests), cases, 0.0)]

    def evaluate_baselines(self) -> dict[str, list[Case]]:
        """Evaluate the model as it is, and with the fact in its prompt: a floor and a ceiling."""
        cases: dict[str, list[Case]] = {name: [] for name in BASELINES}
        for start in range(0, len(self.requests), REQUESTS_PER_PART):
            chunk = self.requests[start : start + REQUESTS_PER_PART]
            part = self._load_part(f"baselines-{start}")
            if part is None:
                scored = self._cases.score(chunk, start, self._cases.baseline_interventions(chunk))
                part = self._save_part(f"baselines-{start}", 0.0, scored)
            for listed, new in zip(cases.values(), part[1], strict=True):
                listed += new
            self.on_progress(len(chunk))
        return cases

    def representative_edit(self, protocol: str, size: int) -> AnyEdit:
        """Return one edit to measure general ability with: all of a sequence, the last batch, or the first edit.

        Args:
            protocol: how the edits were evaluated.
            size: how many were applied at once, at most.
        """
        if protocol == "single":
            return self.editor.edit_each(self.task, self.requests[:1])[0]
        if protocol == "batched":
            whole = len(self.requests) - len(self.requests) % size
            return self.editor.edit(self.task, self.requests[whole - size : whole])
        assert self.sequence is not None
        return self.sequence

    # -- edits and interventions ---------------------------------------------------------------------------------

    def _extend_sequence(self, edit: AnyEdit | None, done: int, size: int) -> AnyEdit:
        """Return ``edit`` of the first ``done`` requests extended by those up to ``size``, one after the other.

        Each is made of the model as the earlier ones leave it, unless the editor says otherwise
        (:attr:`EditorInfo.sequence <remend.editors.info.EditorInfo.sequence>`).
        """
        info = getattr(self.editor, "info", None)  # editors of other packages need not have it
        if info is not None and info.sequence == "all":
            return self.editor.edit(self.task, self.requests[:size])
        if info is not None and info.sequence == "unedited":
            made = self.editor.edit_each(self.task, self.requests[done:size])
            return sum_of_latest([each for each in (edit, *made) if isinstance(each, Edit)])
        for request in self.requests[done:size]:
            # Facts in the prompt change no weights, so the next fact is made of the model as it is.
            with nullcontext() if edit is None or isinstance(edit, ContextEdit) else edit.applied(self.task.model):
                new = self.editor.edit(self.task, [request])
            edit = new if edit is None else _compress(operator.add(edit, new))  # of one editor, so of one kind
        assert edit is not None
        return edit

    def _filter_probes(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """Return the requests with the probes that still count while the edits of all of them are applied."""
        filtered, left_out = filter_probes(requests)
        if left_out:
            self.left_out["locality prompts that another edit at work changes on purpose"] += left_out
        return filtered

    # -- checkpoint ----------------------------------------------------------------------------------------------

    def _load_part(self, name: str) -> Part | None:
        part = self.checkpoint.load_part(name)
        if part is None:
            return None
        cases = [[Case.from_json(case) for case in listed] for listed in part["cases"]]
        return part["seconds"], cases, summaries_from_json(part.get("abilities", {}))

    def _save_part(
        self, name: str, seconds: float, cases: list[list[Case]], intervention: Intervention | None = None
    ) -> Part:
        """Store a part, with the abilities that an intervention leaves, where these are measured."""
        abilities: dict[str, Summary] = {}
        if self._panel is not None and isinstance(intervention, SharedEdit):
            abilities = self._panel.measure(intervention)
        as_json = [[case.to_json() for case in listed] for listed in cases]
        part = {"seconds": seconds, "cases": as_json, "abilities": summaries_as_json(abilities)}
        self.checkpoint.save_part(name, part)
        return seconds, cases, abilities


def _timed(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[float, T]:
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def sum_of_latest(edits: Sequence[Edit]) -> Edit:
    """Return the sum of edits that were made one after another of the unedited model.

    Of several requests with one prompt the last one counts, as if each had been made of the edited model.
    """
    numbered = [(place, number) for place, edit in enumerate(edits) for number in range(len(edit.requests))]
    latest = {edits[place].requests[number].prompt: (place, number) for place, number in numbered}
    kept: list[Edit] = []
    for place, edit in enumerate(edits):
        replaced = [n for n, request in enumerate(edit.requests) if latest[request.prompt] != (place, n)]
        if len(replaced) < len(edit.requests):
            kept.append(edit.without(*replaced))
    return Edit.sum(kept)


def _compress(edit: AnyEdit) -> AnyEdit:
    """Return the same edit with fewer factor pairs, once a matrix has more than twice its full rank."""
    if not isinstance(edit, Edit):
        return edit
    # Removing pairs takes a decomposition of the matrix, so it waits until there are twice as many as needed. A change
    # that is not linear has no other factor pairs.
    linear = {name: change for name, change in edit.changes.items() if change.is_of_weight}
    full = {name: min(change.u.shape[-1], change.delta.shape[-1]) for name, change in linear.items()}
    if not any(change.rank > 2 * full[name] for name, change in linear.items()):
        return edit
    changes = {**edit.changes, **{name: change.recompress(full[name]) for name, change in linear.items()}}
    return replace(edit, changes=changes, taken=None)
