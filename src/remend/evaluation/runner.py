"""Judging some requests after some changes, and the three protocols on top of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import ParamSpec, TypeVar

from remend.edit import Edit
from remend.editors.edit_types import AnyEdit
from remend.editors.in_context import ContextEdit
from remend.editors.protocol import Editor
from remend.errors import ConfigError
from remend.evaluation.checkpoint import EvaluationCheckpoint
from remend.evaluation.interventions import FactsInContext, Intervention, NoIntervention, SeparateEdits, together
from remend.evaluation.metrics.measure import Measurements, look
from remend.evaluation.metrics.perplexity import PerplexityText
from remend.evaluation.metrics.scoring import VALUE, Scorer, Values
from remend.evaluation.probe_filter import in_company
from remend.evaluation.reports.report import Case, Run
from remend.request import EditRequest
from remend.tasks.base import Task

EDITS_AT_ONCE = 32
"""Requests that are judged together and then kept, of single edits; does not change the result."""

BASELINES = ("unedited", "in_context")
"""What edits are judged beside: the model as it is, and with the fact in its prompt."""

T = TypeVar("T")
P = ParamSpec("P")


class EvaluationRunner:
    """A model, an editor and what it is put to the test with.

    Args:
        task: the unedited model.
        editor: what makes edits; None where they were made already.
        requests: what to edit.
        judge: what values the result.
        text: what perplexity is measured on, if it is.
        journal: where what was found is kept.
        on_progress: called with the number of edits that were judged.

    Attributes:
        left_out: how many requests or prompts were not judged, by reason.
        chained: of a sequence, all edits that were made so far, as one.
    """

    def __init__(
        self,
        task: Task,
        editor: Editor | None,
        requests: Sequence[EditRequest],
        judge: Scorer,
        text: PerplexityText | None,
        journal: EvaluationCheckpoint,
        on_progress: Callable[[int], None],
    ) -> None:
        self.task, self.requests, self.judge = task, requests, judge
        self._editor = editor
        self.text, self.journal, self.on_progress = text, journal, on_progress
        self.left_out: Counter[str] = Counter()
        self.chained: AnyEdit | None = None

    @property
    def editor(self) -> Editor:
        """What makes edits."""
        assert self._editor is not None
        return self._editor

    # -- protocols -----------------------------------------------------------------------------------------------

    def single(
        self, scales: Sequence[float], baselines: bool
    ) -> tuple[list[Run], dict[float, list[Case]], dict[str, list[Case]]]:
        """Each edit from the untouched model, judged alone; the same edits at each of ``scales``; and the baselines."""
        every = dict.fromkeys((1.0, *scales))
        found: dict[float | str, list[Case]] = {name: [] for name in (*every, *(BASELINES if baselines else ()))}
        total = 0.0
        for start in range(0, len(self.requests), EDITS_AT_ONCE):
            chunk = self.requests[start : start + EDITS_AT_ONCE]
            kept = self._find(f"single-{start}")
            if kept is None:
                seconds, edits = _timed(self.editor.edit_each, self.task, chunk)
                kept = self._keep(f"single-{start}", seconds, self._apart(chunk, start, edits, every, baselines))
            total += kept[0]
            for own, cases in zip(found.values(), kept[1], strict=True):
                own += cases
            self.on_progress(len(chunk))
        frontier = {scale: found[scale] for scale in sorted(every)} if scales else {}
        beside = {name: found[name] for name in BASELINES} if baselines else {}
        return [Run(1, found[1.0], total / len(self.requests))], frontier, beside

    def batched(self, sizes: Sequence[int]) -> list[Run]:
        """So many edits at once, for each of the sizes; each is judged while all of its batch are at work."""
        runs = []
        for size in sizes:
            whole = len(self.requests) - len(self.requests) % size
            if rest := len(self.requests) - whole:
                self.left_out[f"requests that do not fill a batch of {size}"] += rest
            found: list[Case] = []
            total = 0.0
            for start in range(0, whole, size):
                chunk = self.requests[start : start + size]
                asked = self._in_company(chunk)
                kept = self._find(f"batched-{size}-{start}")
                if kept is None:
                    seconds, edit = _timed(self.editor.edit, self.task, chunk)
                    judged = self._judged(asked, start, [together(self.task, edit, size)])
                    kept = self._keep(f"batched-{size}-{start}", seconds, judged)
                total += kept[0]
                found += kept[1][0]
                self.on_progress(size)
            runs.append(Run(size, found, total / whole))
        return runs

    def sequential(self, sizes: Sequence[int]) -> list[Run]:
        """One edit after another, each made of the model with all earlier ones; all so far are judged at each size."""
        if unused := len(self.requests) - sizes[-1]:
            self.left_out["requests after the last edit"] += unused
        runs: list[Run] = []
        edit: AnyEdit | None = None
        done, total = 0, 0.0
        for size in sizes:
            asked = self._in_company(self.requests[:size])
            kept = self._find(f"after-{size}")
            if kept is None:
                seconds, made = _timed(self._chained, edit, done, size)
                self.journal.keep_edit(size, made)
                judged = self._judged(asked, 0, [together(self.task, made, size)])
                edit = made
                kept = self._keep(f"after-{size}", seconds, judged)
            else:
                edit = self.journal.find_edit(size)
            total += kept[0]
            runs.append(Run(size, kept[1][0], total / size))
            self.on_progress(size - done)
            done = size
        self.chained = edit
        return runs

    def checkpoints(self, edited: Task) -> list[Run]:
        """All requests in another checkpoint, in which they are all at work."""
        found: list[Case] = []
        for start in range(0, len(self.requests), EDITS_AT_ONCE):
            chunk = self.requests[start : start + EDITS_AT_ONCE]
            found += self._judged(chunk, start, [Intervention(edited)])[0]
            self.on_progress(len(chunk))
        return [Run(len(self.requests), found, 0.0)]

    def baselines(self) -> dict[str, list[Case]]:
        """The floor and the ceiling: the model as it is, and with the fact in its prompt."""
        found: dict[str, list[Case]] = {name: [] for name in BASELINES}
        for start in range(0, len(self.requests), EDITS_AT_ONCE):
            chunk = self.requests[start : start + EDITS_AT_ONCE]
            kept = self._find(f"baselines-{start}")
            if kept is None:
                kept = self._keep(f"baselines-{start}", 0.0, self._judged(chunk, start, self._beside(chunk)))
            for own, cases in zip(found.values(), kept[1], strict=True):
                own += cases
            self.on_progress(len(chunk))
        return found

    def at_work(self, protocol: str, size: int) -> AnyEdit:
        """One edit to stand for the whole evaluation: all of a sequence, the last batch, or the first single edit.

        Args:
            protocol: how the edits were judged.
            size: how many were at work at once, at most.
        """
        if protocol == "single":
            return self.editor.edit_each(self.task, self.requests[:1])[0]
        if protocol == "batched":
            whole = len(self.requests) - len(self.requests) % size
            return self.editor.edit(self.task, self.requests[whole - size : whole])
        assert self.chained is not None
        return self.chained

    # -- parts ---------------------------------------------------------------------------------------------------

    def _apart(
        self,
        requests: Sequence[EditRequest],
        start: int,
        edits: Sequence[AnyEdit],
        scales: Iterable[float],
        beside: bool,
    ) -> list[list[Case]]:
        """The cases of each request's own edit at each scale; low-rank ones are judged in one pass."""
        low_rank = [edit for edit in edits if isinstance(edit, Edit)]
        if len(low_rank) == len(edits):
            changes: list[Intervention] = [
                SeparateEdits(self.task, low_rank, scale, free=scale == 1) for scale in scales
            ]
            return self._judged(requests, start, [*changes, *(self._beside(requests) if beside else [])])
        if list(scales) != [1.0]:
            raise ConfigError(f"a {type(edits[0]).__name__} cannot be scaled: leave the scales away (--no-frontier)")
        found = [
            self._judged([one], start + place, [together(self.task, edit, 1), *(self._beside([one]) if beside else [])])
            for place, (one, edit) in enumerate(zip(requests, edits, strict=True))
        ]
        return [[case for own in column for case in own] for column in zip(*found, strict=True)]

    def _chained(self, edit: AnyEdit | None, done: int, size: int) -> AnyEdit:
        """``edit`` of the first ``done`` requests and then, up to ``size``, one of each after the other.

        Each is made of the model as the earlier ones leave it; of an editor whose edits cannot be added, all at once.
        """
        traits = getattr(self.editor, "traits", None)  # which an editor of somebody else's may lack
        if traits is not None and not traits.sequences:
            return self.editor.edit(self.task, self.requests[:size])
        for request in self.requests[done:size]:
            with nullcontext() if edit is None or isinstance(edit, ContextEdit) else edit.applied(self.task.model):
                new = self.editor.edit(self.task, [request])
            edit = new if edit is None else _reduced(edit + new)  # type: ignore[operator]  # of one editor, so of one kind
        assert edit is not None
        return edit

    def _in_company(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The same requests with what is still theirs to judge while all of them are at work."""
        found, changed = in_company(requests)
        if changed:
            self.left_out["locality prompts that another edit at work changes on purpose"] += changed
        return found

    def _beside(self, requests: Sequence[EditRequest]) -> list[Intervention]:
        """What :data:`BASELINES` names."""
        told = [ContextEdit((request,)) for request in requests]
        return [NoIntervention(self.task, self.judge.own), FactsInContext(self.task, told)]

    def _judged(self, requests: Sequence[EditRequest], start: int, changes: Sequence[Intervention]) -> list[list[Case]]:
        """The cases after each change; ``start`` numbers requests that have no name."""
        questions = [self.judge.questions(request) for request in requests]
        views = look(self.task, changes, questions, self.judge.limit)
        found = []
        for change, own in zip(changes, views, strict=True):
            costs = self._drawdowns(change, len(requests))
            found.append(
                [
                    self._case(request, start + number, view, cost)
                    for number, (request, view, cost) in enumerate(zip(requests, own, costs, strict=True))
                ]
            )
        return found

    def _drawdowns(self, change: Intervention, requests: int) -> list[Values]:
        """How much worse the text is predicted after each request's edit, where that is measured."""
        if self.text is None or not change.free or isinstance(change, NoIntervention | FactsInContext):
            return [{} for _ in range(requests)]
        after = self.text.after(change, requests if isinstance(change, SeparateEdits) else 1)
        found: list[Values] = [{"perplexity_drawdown": {VALUE: own - self.text.perplexity}} for own in after]
        return found + [{}] * (requests - len(found))  # what is measured once counts once

    def _case(self, request: EditRequest, number: int, view: Measurements, more: Values) -> Case:
        judge = self.judge
        seen = view.seen.get(judge.own_question(request.prompt))
        about: dict[str, str | float] = {"target_tokens": judge.target_length(request)}
        if isinstance(relation := (request.model_extra or {}).get("relation"), str):
            about["relation"] = relation
        if seen is not None:
            about["confidence"] = math.exp(seen.log_p_before)
        return Case(
            id=request.id if request.id is not None else number,
            prompt=str(request.prompt),
            target=request.target,
            before=self.task.decode(judge.own[request.prompt]),
            values=judge.values(request, view) | more,
            about=about,
            answers=judge.answers(request, view),
        )

    def _find(self, part: str) -> tuple[float, list[list[Case]]] | None:
        kept = self.journal.find(part)
        return kept and (kept["seconds"], [[Case.of(case) for case in cases] for cases in kept["cases"]])

    def _keep(self, part: str, seconds: float, cases: list[list[Case]]) -> tuple[float, list[list[Case]]]:
        found = [[case.to_json() for case in own] for own in cases]
        self.journal.keep(part, {"seconds": seconds, "cases": found})
        return seconds, cases


def _timed(make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[float, T]:
    began = time.perf_counter()
    made = make(*args, **kwargs)
    return time.perf_counter() - began, made


def _reduced(edit: AnyEdit) -> AnyEdit:
    """The same edit in fewer factor pairs, once there are more than a full matrix has."""
    if not isinstance(edit, Edit):
        return edit
    full = {name: min(change.u.shape[-1], change.delta.shape[-1]) for name, change in edit.changes.items()}
    if not any(change.rank > 2 * full[name] and not change.gate for name, change in edit.changes.items()):
        return edit
    return replace(edit, changes={name: change.recompress(full[name]) for name, change in edit.changes.items()})
