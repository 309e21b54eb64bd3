"""The single-edit protocol: each edit is made from the untouched model and judged alone; many are judged in one pass.

Whether an answer is given freely is told without decoding: under teacher forcing, a whole answer and its end token are
the first choice at every position exactly if greedy decoding emits that answer and stops. So ``generated`` asks for the
end token too, and ``teacher_forced`` (what most of the literature reports, and kinder) does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.editors.protocol import Editor
from remend.errors import RequestError
from remend.evaluation.judging import Judge, look, own_answers
from remend.evaluation.report import Case, Report, environment
from remend.request import EditRequest
from remend.tasks import task_of

EDITS_AT_ONCE = 32
SCALES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""What edits are multiplied with for a frontier; at 0 they do nothing, which needs no measuring."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    editor: Editor,
    requests: Sequence[EditRequest],
    *,
    data: str = "",
    max_new_tokens: int = 32,
    scales: Sequence[float] = (),
    name: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Edit the model once for each request and measure what changed and what did not.

    Metrics, each a mean over edits: ``reliability`` (the prompt), ``generality`` (paraphrases), ``generality_unseen``,
    ``edit_success`` (prompt and paraphrases together, paper Eq. 1), ``locality_far`` and ``locality_near`` (share of
    prompts whose answer is the unedited model's; near ones that have a ``kind`` for each kind too, as
    ``locality_near_same_object``), ``accuracy_drawdown`` (accuracy lost on the far prompts' true answers) and
    ``portability``.

    Args:
        model: the unedited model; left as it was.
        tokenizer: the model's.
        editor: anything that makes edits.
        requests: what to edit, one at a time.
        data: where they come from, for the report.
        max_new_tokens: how far the unedited model's own answers are decoded.
        scales: multiples of each edit that are judged too, for the frontier between success and locality.
        name: of the editor, for the report.
        on_progress: called with (edits done, edits in all).

    Raises:
        RequestError: there is no request, or one does not fit the model's context.
    """
    if not requests:
        raise RequestError("there is no request to evaluate on")
    task = task_of(model, tokenizer)
    every = (1.0, *(scale for scale in scales if scale != 1))
    judge = Judge(task, own_answers(task, requests, max_new_tokens))
    cases: dict[float, list[Case]] = {scale: [] for scale in every}
    seconds = 0.0
    for start in range(0, len(requests), EDITS_AT_ONCE):
        chunk = requests[start : start + EDITS_AT_ONCE]
        began = time.perf_counter()
        edits = editor.edit_each(task.model, task.tokenizer, chunk)
        seconds += time.perf_counter() - began
        looks = look(task, edits, [judge.pairs(request) for request in chunk], every)
        for scale, seen in zip(every, looks, strict=True):
            for number, (request, own) in enumerate(zip(chunk, seen, strict=True)):
                cases[scale].append(
                    Case(
                        id=request.id if request.id is not None else start + number,
                        prompt=str(request.prompt),
                        target=request.target,
                        before=task.text(judge.own[request.prompt]),
                        values=judge.values(request, own),
                    )
                )
        on_progress(min(start + EDITS_AT_ONCE, len(requests)), len(requests))
    model_name = str(model.config._name_or_path)
    frontier = {scale: cases[scale] for scale in sorted(every)} if len(every) > 1 else {}
    return Report(model_name, data, cases[1.0], seconds / len(requests), environment(task.device), frontier, name)
