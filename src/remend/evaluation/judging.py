"""Looking at prompts with and without an edit, and judging what is seen there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from remend.base import find_modules
from remend.core.branch import branches, frozen
from remend.core.low_rank import LowRank, stack
from remend.edit import Edit
from remend.request import EditRequest, Probe, Prompt
from remend.tasks.task import Batch, Pair, Task

ROWS_AT_ONCE = 128

Answers = Mapping[Prompt, tuple[int, ...]]
"""The unedited model's free answer to each prompt."""


@dataclass(frozen=True)
class Look:
    """One prompt looked at with and without the edit: what to expect, and the first choice at each of its tokens."""

    pair: Pair
    before: tuple[int, ...]
    after: tuple[int, ...]


class Judge:
    """Compares first choices with expected tokens, and knows the end tokens.

    Args:
        task: the base model.
        own: its own answers to the prompts that must not change, and to the edited ones.
    """

    def __init__(self, task: Task, own: Answers) -> None:
        self.task = task
        self.own = own
        self.ends = task.ends

    def pairs(self, request: EditRequest) -> list[Pair]:
        """Every prompt of a request with every answer that is looked for there."""
        task = self.task
        prompts = (request.prompt, *request.paraphrases, *request.unseen_paraphrases)
        pairs = [task.tokenise(prompt, request.target) for prompt in prompts]
        pairs += [task.tokenise(probe.prompt, probe.target) for probe in request.portability]
        for probe in (*request.locality, *request.near):
            pairs += [task.tokenise(probe.prompt, probe.target), self._answered(probe.prompt)]
        return list(dict.fromkeys(pairs))

    def values(self, request: EditRequest, looks: Mapping[Pair, Look]) -> dict[str, dict[str, float]]:
        """Every metric that this request has data for, by mode."""
        kinds: dict[str, list[Probe]] = {}
        for probe in request.near:
            if isinstance(kind := (probe.model_extra or {}).get("kind"), str):
                kinds.setdefault(f"locality_near_{kind}", []).append(probe)
        portable = [looks[self.task.tokenise(probe.prompt, probe.target)] for probe in request.portability]
        collected = {
            "reliability": self._answers(request, [request.prompt], looks),
            "generality": self._answers(request, request.paraphrases, looks),
            "generality_unseen": self._answers(request, request.unseen_paraphrases, looks),
            "edit_success": self._answers(request, [request.prompt, *request.paraphrases], looks),
            "locality_far": self._kept(request.locality, looks),
            "locality_near": self._kept(request.near, looks),
            **{name: self._kept(probes, looks) for name, probes in kinds.items()},
            "accuracy_drawdown": self._lost(request.locality, looks),
            "portability": [self._right(look.pair, look.after) for look in portable],
        }
        return {
            name: {mode: sum(v[mode] for v in values) / len(values) for mode in values[0]}
            for name, values in collected.items()
            if values
        }

    def _answered(self, prompt: Prompt) -> Pair:
        """A prompt with the unedited model's own answer."""
        return Pair(tuple(self.task.prompt_ids(prompt)), self.own[prompt])

    def _body(self, pair: Pair) -> int:
        """How many tokens of the target come before its end token."""
        return len(pair.target) - int(pair.target[-1] in self.ends)

    def _right(self, pair: Pair, chosen: tuple[int, ...]) -> dict[str, float]:
        """Whether the target is answered: without regard to the end (teacher forced), and with it (generated)."""
        body = self._body(pair)
        return {
            "teacher_forced": float(chosen[:body] == pair.target[:body]),
            "generated": float(chosen == pair.target),
        }

    def _answers(
        self, request: EditRequest, prompts: Sequence[Prompt], looks: Mapping[Pair, Look]
    ) -> list[dict[str, float]]:
        pairs = [self.task.tokenise(prompt, request.target) for prompt in prompts]
        return [self._right(pair, looks[pair].after) for pair in pairs]

    def _kept(self, probes: Sequence[Probe], looks: Mapping[Pair, Look]) -> list[dict[str, float]]:
        """Whether each answer is what the unedited model answered.

        Teacher forced: token by token, along the answer that the request names. Generated: the model's own free answer.
        """
        found = []
        for probe in probes:
            given, own = looks[self.task.tokenise(probe.prompt, probe.target)], looks[self._answered(probe.prompt)]
            body = self._body(given.pair)
            found.append(
                {
                    "teacher_forced": float(given.before[:body] == given.after[:body]),
                    "generated": float(own.after == own.pair.target),
                }
            )
        return found

    def _lost(self, probes: Sequence[Probe], looks: Mapping[Pair, Look]) -> list[dict[str, float]]:
        found = [looks[self.task.tokenise(probe.prompt, probe.target)] for probe in probes]
        pairs = [(self._right(look.pair, look.before), self._right(look.pair, look.after)) for look in found]
        return [{mode: before[mode] - after[mode] for mode in before} for before, after in pairs]


def own_answers(task: Task, requests: Sequence[EditRequest], limit: int) -> dict[Prompt, tuple[int, ...]]:
    """The unedited model's free answer to every prompt that must not change, and to the edited prompts."""
    prompts = dict.fromkeys(p.prompt for request in requests for p in (request, *request.locality, *request.near))
    return dict(zip(prompts, task.answers(list(prompts), limit), strict=True))


@torch.no_grad()
def look(
    task: Task, edits: Sequence[Edit], wanted: Sequence[Sequence[Pair]], scales: Sequence[float] = (1.0,)
) -> list[list[dict[Pair, Look]]]:
    """The first choices at every wanted pair's target, before and after its own edit; rows of all edits go together.

    Args:
        task: the base model.
        edits: the edits.
        wanted: for each edit the pairs to look at.
        scales: what the edits are multiplied with; what is there without an edit is looked at once for all.

    Returns:
        For each scale, for each edit, what was seen.
    """
    changes = _stacked(edits)
    modules = find_modules(task.model, changes)
    rows = [(number, pair) for number, pairs in enumerate(wanted) for pair in pairs]
    rows.sort(key=lambda row: len(row[1]))  # rows of like length pad least
    found: list[list[dict[Pair, Look]]] = [[{} for _ in edits] for _ in scales]
    with frozen(task.model):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            batch = task.collate([pair for _, pair in chunk])
            episodes = torch.tensor([number for number, _ in chunk])
            selected = {name: change.select(episodes.to(change.u.device)) for name, change in changes.items()}
            before = _first_choices(task, batch)
            for scale, seen in zip(scales, found, strict=True):
                with branches(modules, {name: change.scaled(scale) for name, change in selected.items()}):
                    after = _first_choices(task, batch)
                for (number, pair), b, a in zip(chunk, before, after, strict=True):
                    seen[number][pair] = Look(pair, b, a)
    return found


def _stacked(edits: Sequence[Edit]) -> dict[str, LowRank]:
    """One batched change for each module that any of the edits touches; an edit that does not adds nothing there."""
    stacked = {}
    for name in dict.fromkeys(name for edit in edits for name in edit.changes):
        like = next(edit.changes[name] for edit in edits if name in edit.changes)
        nothing = replace(like, u=like.u[:0], delta=like.delta[:0])
        stacked[name] = stack([edit.changes.get(name, nothing) for edit in edits])
    return stacked


def _first_choices(task: Task, batch: Batch) -> list[tuple[int, ...]]:
    """The most probable token at each position that predicts a target token, row by row."""
    chosen: list[list[int]] = [[] for _ in range(batch.rows)]
    for row, token in zip(batch.row.tolist(), task.target_logits(batch).argmax(-1).tolist(), strict=True):
        chosen[row].append(token)
    return [tuple(tokens) for tokens in chosen]
