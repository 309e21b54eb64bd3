"""The single-edit protocol: each edit is made from the untouched model and judged alone; many are judged in one pass.

Whether an answer is given freely is told without decoding: under teacher forcing, a whole answer and its end token are
the first choice at every position exactly if greedy decoding emits that answer and stops. So ``generated`` asks for the
end token too, and ``teacher_forced`` (what most of the literature reports, and kinder) does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.base import find_modules
from remend.core.branch import branches, frozen
from remend.core.low_rank import LowRank, stack
from remend.edit import Edit
from remend.editors.protocol import Editor
from remend.errors import RequestError
from remend.evaluation.report import Case, Report, environment
from remend.request import EditRequest, Probe
from remend.tasks.causal_lm import Batch, CausalLM, Pair

EDITS_AT_ONCE = 32
ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class _Look:
    """One prompt looked at with and without the edit: what to expect, and the first choice at each of its tokens."""

    pair: Pair
    before: tuple[int, ...]
    after: tuple[int, ...]


class _Judge:
    """Compares first choices with expected tokens; knows the end token."""

    def __init__(self, end: int | None) -> None:
        self.end = end

    def _body(self, pair: Pair) -> int:
        """How many tokens of the target come before its end token."""
        return len(pair.target) - (pair.target[-1] == self.end)

    def right(self, pair: Pair, chosen: tuple[int, ...]) -> dict[str, float]:
        """Whether the target is answered: without regard to the end (teacher forced), and with it (generated)."""
        body = self._body(pair)
        return {
            "teacher_forced": float(chosen[:body] == pair.target[:body]),
            "generated": float(chosen == pair.target),
        }

    def kept(self, given: _Look, own: _Look) -> dict[str, float]:
        """Whether the answer is what the unedited model answered.

        Args:
            given: the prompt with the answer that the request names: compared token by token, teacher forced.
            own: the prompt with the unedited model's own free answer.
        """
        body = self._body(given.pair)
        return {
            "teacher_forced": float(given.before[:body] == given.after[:body]),
            "generated": float(own.after == own.pair.target),
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    editor: Editor,
    requests: Sequence[EditRequest],
    *,
    data: str = "",
    max_new_tokens: int = 32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Edit the model once for each request and measure what changed and what did not.

    Metrics, each a mean over edits: ``reliability`` (the prompt), ``generality`` (paraphrases), ``generality_unseen``,
    ``edit_success`` (prompt and paraphrases together, paper Eq. 1), ``locality_far`` and ``locality_near`` (share of
    prompts whose answer is the unedited model's), ``accuracy_drawdown`` (accuracy lost on the far prompts' true
    answers) and ``portability``.

    Args:
        model: the unedited model; left as it was.
        tokenizer: the model's.
        editor: anything that makes edits.
        requests: what to edit, one at a time.
        data: where they come from, for the report.
        max_new_tokens: how far the unedited model's own answers are decoded.
        on_progress: called with (edits done, edits in all).

    Raises:
        RequestError: there is no request, or one does not fit the model's context.
    """
    if not requests:
        raise RequestError("there is no request to evaluate on")
    task = CausalLM(model, tokenizer)
    with frozen(model):
        cases, seconds = _all_cases(task, editor, requests, max_new_tokens, on_progress)
    name = str(model.config._name_or_path)
    return Report(name, data, cases, seconds / len(requests), environment(task.device))


def _all_cases(
    task: CausalLM,
    editor: Editor,
    requests: Sequence[EditRequest],
    max_new_tokens: int,
    on_progress: Callable[[int, int], None],
) -> tuple[list[Case], float]:
    """Every request's case, and the seconds that making the edits took."""
    own = _own_answers(task, requests, max_new_tokens)
    cases: list[Case] = []
    seconds = 0.0
    for start in range(0, len(requests), EDITS_AT_ONCE):
        chunk = requests[start : start + EDITS_AT_ONCE]
        began = time.perf_counter()
        edits = editor.edit_each(task.model, task.tokenizer, chunk)
        seconds += time.perf_counter() - began
        cases += _cases(task, chunk, edits, own, start)
        on_progress(len(cases), len(requests))
    return cases, seconds


def _own_answers(task: CausalLM, requests: Sequence[EditRequest], limit: int) -> dict[str, tuple[int, ...]]:
    """The unedited model's free answer to every prompt that must not change, and to the edited prompts."""
    prompts = dict.fromkeys(p.prompt for request in requests for p in (request, *request.locality, *request.near))
    return dict(zip(prompts, task.answers(list(prompts), limit), strict=True))


def _cases(
    task: CausalLM,
    requests: Sequence[EditRequest],
    edits: Sequence[Edit],
    own: Mapping[str, tuple[int, ...]],
    first: int,
) -> list[Case]:
    """Judge each edit on all prompts of its request."""
    wanted: list[dict[Pair, None]] = [dict.fromkeys(_pairs(task, request, own)) for request in requests]
    looks = _look(task, edits, wanted)
    judge = _Judge(task.tokenizer.eos_token_id)
    return [
        Case(
            id=request.id if request.id is not None else first + number,
            prompt=request.prompt,
            target=request.target,
            before=task.text(own[request.prompt]),
            values=_values(task, judge, request, own, looks[number]),
        )
        for number, request in enumerate(requests)
    ]


def _pairs(task: CausalLM, request: EditRequest, own: Mapping[str, tuple[int, ...]]) -> list[Pair]:
    """Every prompt of a request with every answer that is looked for there."""
    prompts = (request.prompt, *request.paraphrases, *request.unseen_paraphrases)
    pairs = [task.tokenise(prompt, request.target) for prompt in prompts]
    pairs += [task.tokenise(probe.prompt, probe.target) for probe in request.portability]
    for probe in (*request.locality, *request.near):
        pairs += [task.tokenise(probe.prompt, probe.target), _answered(task, probe.prompt, own)]
    return pairs


def _answered(task: CausalLM, prompt: str, own: Mapping[str, tuple[int, ...]]) -> Pair:
    return Pair(tuple(task.prompt_ids(prompt)), own[prompt])


@torch.no_grad()
def _look(task: CausalLM, edits: Sequence[Edit], wanted: Sequence[Mapping[Pair, None]]) -> list[dict[Pair, _Look]]:
    """The first choices at every wanted pair's target, before and after its own edit; rows of all edits go together."""
    changes = _stacked(edits)
    modules = find_modules(task.model, changes)
    rows = [(number, pair) for number, pairs in enumerate(wanted) for pair in pairs]
    rows.sort(key=lambda row: len(row[1]))  # rows of like length pad least
    found: list[dict[Pair, _Look]] = [{} for _ in edits]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chunk = rows[start : start + ROWS_AT_ONCE]
        batch = task.collate([pair for _, pair in chunk])
        episodes = torch.tensor([number for number, _ in chunk])
        selected = {name: _selected(change, episodes) for name, change in changes.items()}
        before = _first_choices(task, batch)
        with branches(modules, selected):
            after = _first_choices(task, batch)
        for (number, pair), b, a in zip(chunk, before, after, strict=True):
            found[number][pair] = _Look(pair, b, a)
    return found


def _stacked(edits: Sequence[Edit]) -> dict[str, LowRank]:
    """One batched change for each module that any of the edits touches; an edit that does not adds nothing there."""
    stacked = {}
    for name in dict.fromkeys(name for edit in edits for name in edit.changes):
        like = next(edit.changes[name] for edit in edits if name in edit.changes)
        nothing = LowRank(like.u[:0], like.delta[:0])
        stacked[name] = stack([edit.changes.get(name, nothing) for edit in edits])
    return stacked


def _selected(change: LowRank, episodes: torch.Tensor) -> LowRank:
    return change.select(episodes.to(change.u.device))


def _first_choices(task: CausalLM, batch: Batch) -> list[tuple[int, ...]]:
    """The most probable token at each position that predicts a target token, row by row."""
    chosen: list[list[int]] = [[] for _ in range(batch.rows)]
    for row, token in zip(batch.row.tolist(), task.target_logits(batch).argmax(-1).tolist(), strict=True):
        chosen[row].append(token)
    return [tuple(tokens) for tokens in chosen]


def _values(
    task: CausalLM,
    judge: _Judge,
    request: EditRequest,
    own: Mapping[str, tuple[int, ...]],
    looks: Mapping[Pair, _Look],
) -> dict[str, dict[str, float]]:
    """Every metric that this request has data for."""

    def answered(prompts: Sequence[str]) -> list[dict[str, float]]:
        pairs = [task.tokenise(prompt, request.target) for prompt in prompts]
        return [judge.right(pair, looks[pair].after) for pair in pairs]

    def kept(probes: Sequence[Probe]) -> list[dict[str, float]]:
        given = [looks[task.tokenise(probe.prompt, probe.target)] for probe in probes]
        return [judge.kept(g, looks[_answered(task, p.prompt, own)]) for g, p in zip(given, probes, strict=True)]

    def lost(probes: Sequence[Probe]) -> list[dict[str, float]]:
        found = [looks[task.tokenise(probe.prompt, probe.target)] for probe in probes]
        pairs = [(judge.right(look.pair, look.before), judge.right(look.pair, look.after)) for look in found]
        return [{mode: before[mode] - after[mode] for mode in before} for before, after in pairs]

    portable = [task.tokenise(probe.prompt, probe.target) for probe in request.portability]
    collected = {
        "reliability": answered([request.prompt]),
        "generality": answered(request.paraphrases),
        "generality_unseen": answered(request.unseen_paraphrases),
        "edit_success": answered([request.prompt, *request.paraphrases]),
        "locality_far": kept(request.locality),
        "locality_near": kept(request.near),
        "accuracy_drawdown": lost(request.locality),
        "portability": [judge.right(pair, looks[pair].after) for pair in portable],
    }
    return {
        name: {mode: sum(v[mode] for v in values) / len(values) for mode in values[0]}
        for name, values in collected.items()
        if values
    }
