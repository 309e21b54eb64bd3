"""How edits are put to the test: alone, several at once, or one after another; always beside the unedited model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from remend.editors.protocol import Editor
from remend.errors import ConfigError, RequestError
from remend.evaluation.checkpoint import EvaluationCheckpoint, about
from remend.evaluation.metrics.lm_eval import LmEvalTasks, Scores, before_after
from remend.evaluation.metrics.perplexity import PerplexityText
from remend.evaluation.metrics.scoring import Scorer
from remend.evaluation.reports.report import Case, Report, Run, environment
from remend.evaluation.runner import EvaluationRunner
from remend.fingerprint import model_name
from remend.request import EditRequest
from remend.tasks import Task

PROTOCOLS = ("single", "batched", "sequential")
SCALES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""What edits are multiplied with for a frontier; at 0 they do nothing, which needs no measuring."""
TEXT_TOKENS = 1_024
"""Tokens of a text that perplexity is measured on, by default."""


def evaluate(
    task: Task,
    editor: Editor,
    requests: Sequence[EditRequest],
    *,
    protocol: str = "single",
    edits: Sequence[int] = (),
    baselines: bool = True,
    scales: Sequence[float] = (),
    text: Sequence[str] = (),
    text_tokens: int = TEXT_TOKENS,
    ability: LmEvalTasks | None = None,
    data: str = "",
    name: str = "",
    max_new_tokens: int = 32,
    journal: Path | None = None,
    resume: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Edit the model as each request asks, and measure what changed and what did not.

    ``single``: each edit is made from the untouched model and judged alone. ``batched``: so many at once, by
    :meth:`Editor.edit`, for each of the numbers ``edits``; all of a batch are judged while all are at work. A last
    batch that is not full is left out (and counted). ``sequential``: each edit is made of the model with all earlier
    ones at work, and after each of the numbers ``edits`` all edits so far are judged. In these two, what must stay is
    asked of the whole: :mod:`remend.evaluation.probe_filter`.

    What is measured, if the requests have data for it, each with its mean over edits:

    - ``reliability`` (the prompt), ``generality`` (paraphrases), ``generality_unseen``, ``edit_success`` (prompt and
      paraphrases together, paper Eq. 1), ``format_shift`` (question, completion, chat), ``portability``, and the last
      two for each kind of prompt (``portability_negated``: prompts that deny the fact and are not answered with it);
    - ``locality_far``, ``locality_near`` (and for each kind) and ``locality_adversarial``: the share of prompts whose
      answer is the unedited model's; ``kl_…``, the divergence there; ``accuracy_drawdown``, what is lost of the far
      prompts' true answers; ``perplexity_drawdown``, the text's perplexity that the edit adds;
    - ``target_probability`` and ``target_rank``, ``fluency`` and ``repetition``.

    :mod:`remend.evaluation.metrics.functions` defines them.

    Args:
        task: the base model.
        editor: anything that makes edits.
        requests: what to edit.
        protocol: one of :data:`PROTOCOLS`.
        edits: of ``batched`` and ``sequential``, how many are at work at once; by default all.
        baselines: whether the unedited model is judged too, as it is and with the fact in its prompt.
        scales: of ``single``, multiples of each edit that are judged too, for the frontier of success and locality.
        text: passages on which perplexity is measured after each edit.
        text_tokens: how many tokens of it.
        ability: what of lm-evaluation-harness to examine the model in, without any edit and after all of a sequence,
            after the last batch (of the largest number of edits), or, of ``single``, after the first edit alone.
        data: where the requests come from, for the report.
        name: of the editor, for the report.
        max_new_tokens: how far answers are decoded.
        journal: a folder for what was found so far; removed when all is done.
        resume: whether to go on with what that folder holds.
        on_progress: called with (parts done, parts in all).

    Raises:
        RequestError: there is no request, or one does not fit the model's context.
        ConfigError: the settings do not go together.
        FileError: the journal is of another evaluation.
    """
    if not requests:
        raise RequestError("there is no request to evaluate on")
    sizes = _sizes(protocol, edits, scales, len(requests))
    settings = {"protocol": protocol, "edits": sizes, "scales": list(scales), "limit": max_new_tokens}
    settings |= {"baselines": baselines, "text": list(text), "text_tokens": text_tokens}
    if ability is not None:
        settings["ability"] = [list(ability.tasks), str(ability.folder), ability.limit]
    kept = EvaluationCheckpoint(journal, about(task.model, editor, requests, settings) if journal else "", resume)
    apart = baselines and protocol != "single"
    advance = _advance(_total(protocol, sizes, len(requests)) + len(requests) * apart, on_progress)
    sample = PerplexityText(task, text, text_tokens) if text else None
    bench = EvaluationRunner(task, editor, requests, Scorer(task, requests, max_new_tokens), sample, kept, advance)
    before = {} if ability is None else _scores(kept, "general-before", lambda: ability.measure(task))
    found = bench.baselines() if apart else {}
    frontier: dict[float, list[Case]] = {}
    if protocol == "single":
        runs, frontier, found = bench.single(scales, baselines)
    else:
        runs = bench.batched(sizes) if protocol == "batched" else bench.sequential(sizes)
    general = {}
    if ability is not None:

        def edited() -> Scores:
            with bench.at_work(protocol, sizes[-1]).applied(task.model):
                return ability.measure(task)

        general = before_after(before, _scores(kept, "general-after", edited))
    report = _report(bench, protocol, runs, found, frontier, data, name, general)
    kept.close()
    return report


def evaluate_checkpoints(
    before: Task,
    after: Task,
    requests: Sequence[EditRequest],
    *,
    baselines: bool = True,
    text: Sequence[str] = (),
    text_tokens: int = TEXT_TOKENS,
    ability: LmEvalTasks | None = None,
    data: str = "",
    name: str = "",
    max_new_tokens: int = 32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Judge a model into which edits were made, by whatever tool, as :func:`evaluate` judges edits.

    Args:
        before: the model without the edits.
        after: the same with all of them.
        requests: what the edits were to do.
        baselines: whether the unedited model is judged too, as it is and with the fact in its prompt.
        text: passages on which perplexity is measured.
        text_tokens: how many tokens of it.
        ability: what of lm-evaluation-harness to examine both models in.
        data: where the requests come from, for the report.
        name: of what made the edits, for the report.
        max_new_tokens: how far answers are decoded.
        on_progress: called with (parts done, parts in all).

    Raises:
        RequestError: there is no request, or one does not fit the model's context.
        ConfigError: the models have other vocabularies.
    """
    if not requests:
        raise RequestError("there is no request to evaluate on")
    sizes = [task.model.config.get_text_config().vocab_size for task in (before, after)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the edited model has a vocabulary of {sizes[1]} tokens and the unedited one of {sizes[0]}: both must be "
            "checkpoints of one model"
        )
    advance = _advance(len(requests) * (1 + baselines), on_progress)
    sample = PerplexityText(before, text, text_tokens) if text else None
    bench = EvaluationRunner(
        before, None, requests, Scorer(before, requests, max_new_tokens), sample, EvaluationCheckpoint(None), advance
    )
    found = bench.baselines() if baselines else {}
    general = {} if ability is None else before_after(*(ability.measure(task) for task in (before, after)))
    return _report(bench, "checkpoints", bench.checkpoints(after), found, {}, data, name, general)


def _advance(total: int, on_progress: Callable[[int, int], None]) -> Callable[[int], None]:
    done = 0

    def advance(edits: int) -> None:
        nonlocal done
        done += edits
        on_progress(done, total)

    return advance


def _scores(kept: EvaluationCheckpoint, part: str, measure: Callable[[], Scores]) -> Scores:
    """What was measured before this evaluation was stopped, or is now."""
    found: Scores | None = kept.find(part)
    if found is None:
        found = measure()
        kept.keep(part, found)
    return found


def _report(
    bench: EvaluationRunner,
    protocol: str,
    runs: Sequence[Run],
    baselines: Mapping[str, Sequence[Case]],
    frontier: Mapping[float, Sequence[Case]],
    data: str,
    name: str,
    general: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> Report:
    text = bench.text
    return Report(
        model=model_name(bench.task.model),
        data=data,
        editor=name,
        protocol=protocol,
        runs=runs,
        baselines=baselines,
        frontier=frontier,
        text={} if text is None else {"tokens": text.tokens, "perplexity": text.perplexity},
        left_out=bench.left_out,
        general=general,
        environment=environment(bench.task.device),
    )


def _sizes(protocol: str, edits: Sequence[int], scales: Sequence[float], requests: int) -> list[int]:
    """How many edits are to be at work at once, in order."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"the protocol is one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    if protocol == "single":
        if edits:
            raise ConfigError("single edits are alone in the model: give edits with batched or sequential")
        return [1]
    if scales:
        raise ConfigError(f"scales are of single edits: leave them away with {protocol}")
    if wrong := [size for size in edits if not 1 <= size <= requests]:
        raise ConfigError(
            f"there are {requests} requests, so from 1 to {requests} edits can be at work, not {wrong[0]}"
        )
    return sorted(set(edits)) or [requests]


def _total(protocol: str, sizes: Sequence[int], requests: int) -> int:
    """How many edits will be judged or, of a sequence, made."""
    return {
        "single": requests,
        "batched": sum(requests - requests % size for size in sizes),
        "sequential": max(sizes),
    }[protocol]
