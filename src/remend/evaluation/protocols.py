"""``evaluate``: measure an editor on requests, whose edits are applied alone, in batches, or one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from remend.editors.base import EditorLike
from remend.editors.request_checks import refuse_conflicts, refuse_unreadable
from remend.errors import ConfigError, RequestError
from remend.evaluation.abilities import AbilityPanel
from remend.evaluation.checkpoint import EvaluationCheckpoint, evaluation_fingerprint
from remend.evaluation.metrics.lm_eval import LmEvalTasks, TaskScores, pair_scores
from remend.evaluation.metrics.scorer import Scorer
from remend.evaluation.ordinary_text import TEXT_TOKENS, OrdinaryText
from remend.evaluation.reports.report import Case, Report, Run, environment
from remend.evaluation.runner import EvaluationRunner
from remend.fingerprint import model_name
from remend.request import EditRequest
from remend.tasks import Task

PROTOCOLS = ("single", "batched", "sequential")
FRONTIER_STRENGTHS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""What edits are multiplied with for a frontier; at 0 they do nothing, which need not be measured."""


def evaluate(
    task: Task,
    editor: EditorLike,
    requests: Sequence[EditRequest],
    *,
    protocol: str = "single",
    edits: Sequence[int] = (),
    baselines: bool = True,
    strengths: Sequence[float] = (),
    perturbed: bool = False,
    text: Sequence[str] = (),
    text_tokens: int = TEXT_TOKENS,
    lm_eval: LmEvalTasks | None = None,
    abilities: bool = False,
    data: str = "",
    name: str = "",
    max_new_tokens: int = 32,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_report: Callable[[Report], Report] = lambda report: report,
) -> Report:
    """Edit the model as each request asks, and measure what changes and what stays.

    ``single``: each edit is made of the unedited model and evaluated alone. ``batched``: several edits are made at
    once, by :meth:`Editor.edit`, for each of the numbers ``edits``; all of a batch are evaluated while all are applied.
    A last batch that is not full is left out (and counted). ``sequential``: each edit is made of the model with all
    earlier ones applied, and after each of the numbers ``edits`` all edits so far are evaluated. In the last two,
    probes that another edit changes on purpose are left out (:mod:`remend.evaluation.conflicting_probes`).

    What is measured is registered in :data:`remend.registries.METRICS`, and said there in a sentence each; a metric is
    left out where no request has data for it or the model does not suit.

    Args:
        task: the base model.
        editor: the editor.
        requests: what to edit.
        protocol: one of :data:`PROTOCOLS`.
        edits: of ``batched`` and ``sequential``, how many are applied at once; by default all.
        baselines: whether to evaluate the unedited model too, as it is and with the fact in its prompt.
        strengths: of ``single``, multiples of each edit to evaluate too, for the frontier of success and locality.
        perturbed: of ``single``, whether to evaluate each edit with noise, and with a part left out, too
            (:mod:`remend.evaluation.perturbed_edits`).
        text: passages of ordinary text on which each edit is measured; by default what the model writes by itself.
        text_tokens: how many tokens of it; 0 to leave this out.
        lm_eval: tasks of lm-evaluation-harness in which the model is evaluated without any edit and after all of a
            sequence, after the last batch (of the largest number of edits), or, of ``single``, after the first edit.
        abilities: of ``batched`` and ``sequential``, whether to measure at each number of edits how much of what the
            unedited model gets right stays right, of sums, facts in the prompt and common facts
            (:mod:`remend.evaluation.abilities`).
        data: where the requests come from, for the report.
        name: of the editor, for the report.
        max_new_tokens: the longest free answer.
        checkpoint: a folder for the parts that are finished; removed when all is done.
        resume: whether to go on with what that folder holds.
        on_progress: called with (parts done, parts in all).
        on_report: called with the report before the checkpoint is removed, to save it: if the process is killed or the
            disk is full, the evaluation can be resumed. What it returns is returned.

    Raises:
        RequestError: there is no request, one does not fit the model's context or has unknown text, or two of a batch
            want different answers to one prompt.
        ConfigError: the settings do not go together.
        FileError: the checkpoint is of another evaluation.
    """
    if not requests:
        raise RequestError("there is no request to evaluate: give at least one")
    sizes = _check_sizes(protocol, edits, strengths, perturbed, len(requests))
    _check_abilities(task, editor, protocol, abilities)
    settings = {"protocol": protocol, "edits": sizes, "scales": list(strengths), "limit": max_new_tokens}
    settings |= {"baselines": baselines, "perturbed": perturbed, "text": list(text), "text_tokens": text_tokens}
    if abilities:
        settings["abilities"] = True
    if lm_eval is not None:
        settings["ability"] = [list(lm_eval.tasks), str(lm_eval.folder), lm_eval.limit]
    fingerprint = evaluation_fingerprint(task.model, editor, requests, settings) if checkpoint else ""
    parts = EvaluationCheckpoint(checkpoint, fingerprint, resume)
    # Single edits are evaluated together with the baselines, request by request; other protocols before them.
    baselines_first = baselines and protocol != "single"
    advance = _progress(_total(protocol, sizes, len(requests)) + len(requests) * baselines_first, on_progress)
    ordinary_text = OrdinaryText(task, text, text_tokens) if text_tokens else None
    _check_edits(task, requests, sizes if protocol == "batched" else ())
    scorer = Scorer(task, requests, max_new_tokens)
    panel = AbilityPanel(task, requests) if abilities else None
    if panel is not None and not panel.items:
        raise ConfigError("the unedited model gets no sum, fact in the prompt or common fact right: omit abilities")
    runner = EvaluationRunner(task, editor, requests, scorer, ordinary_text, parts, advance, panel)
    scores_before = {} if lm_eval is None else _scores(parts, "general-before", lambda: lm_eval.measure(task))
    of_baselines = runner.evaluate_baselines() if baselines_first else {}
    frontier: dict[float, list[Case]] = {}
    if protocol == "single":
        runs, frontier, of_baselines = runner.evaluate_single(strengths, baselines, perturbed)
    else:
        runs = runner.evaluate_batched(sizes) if protocol == "batched" else runner.evaluate_sequential(sizes)
    general = {}
    if lm_eval is not None:

        def measure_edited() -> TaskScores:
            with runner.representative_edit(protocol, sizes[-1]).applied(task.model):
                return lm_eval.measure(task)

        general = pair_scores(scores_before, _scores(parts, "general-after", measure_edited))
    report = _report(runner, protocol, runs, of_baselines, frontier, data, name, general)
    report = on_report(report)
    parts.remove()
    return report


def evaluate_checkpoints(
    before: Task,
    after: Task,
    requests: Sequence[EditRequest],
    *,
    baselines: bool = True,
    text: Sequence[str] = (),
    text_tokens: int = TEXT_TOKENS,
    lm_eval: LmEvalTasks | None = None,
    data: str = "",
    name: str = "",
    max_new_tokens: int = 32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Evaluate a checkpoint into which edits were made, by whatever tool, as :func:`evaluate` evaluates edits.

    Args:
        before: the model without the edits.
        after: the same with all of them.
        requests: what the edits were to do.
        baselines: whether to evaluate the unedited model too, as it is and with the fact in its prompt.
        text: passages of ordinary text on which the edits are measured; by default what the model writes by itself.
        text_tokens: how many tokens of it; 0 to leave this out.
        lm_eval: tasks of lm-evaluation-harness in which both models are evaluated.
        data: where the requests come from, for the report.
        name: of what made the edits, for the report.
        max_new_tokens: the longest free answer.
        on_progress: called with (parts done, parts in all).

    Raises:
        RequestError: there is no request, or one does not fit the model's context.
        ConfigError: the models differ in their outputs.
    """
    if not requests:
        raise RequestError("there is no request to evaluate: give at least one")
    if after.output_size != before.output_size:
        raise ConfigError(
            f"the edited model has {after.output_size} outputs and the unedited one {before.output_size}: both must be "
            "checkpoints of one model"
        )
    advance = _progress(len(requests) * (1 + baselines), on_progress)
    ordinary_text = OrdinaryText(before, text, text_tokens) if text_tokens else None
    scorer = Scorer(before, requests, max_new_tokens)
    runner = EvaluationRunner(before, None, requests, scorer, ordinary_text, EvaluationCheckpoint(None), advance)
    of_baselines = runner.evaluate_baselines() if baselines else {}
    general = {} if lm_eval is None else pair_scores(*(lm_eval.measure(task) for task in (before, after)))
    runs = runner.evaluate_checkpoint(after)
    return _report(runner, "checkpoints", runs, of_baselines, {}, data, name, general)


def _progress(total: int, on_progress: Callable[[int, int], None]) -> Callable[[int], None]:
    """Return a function that adds to the number of edits done and passes it on with their total."""
    done = 0

    def advance(edits: int) -> None:
        nonlocal done
        done += edits
        on_progress(done, total)

    return advance


def _scores(checkpoint: EvaluationCheckpoint, part: str, measure: Callable[[], TaskScores]) -> TaskScores:
    """Return the scores that were measured before this evaluation was stopped, or measure them."""
    scores: TaskScores | None = checkpoint.load_part(part)
    if scores is None:
        scores = measure()
        checkpoint.save_part(part, scores)
    return scores


def _report(
    runner: EvaluationRunner,
    protocol: str,
    runs: Sequence[Run],
    baselines: Mapping[str, Sequence[Case]],
    frontier: Mapping[float, Sequence[Case]],
    data: str,
    name: str,
    general: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> Report:
    text = runner.text
    return Report(
        model=model_name(runner.task.model),
        data=data,
        editor=name,
        protocol=protocol,
        runs=runs,
        baselines=baselines,
        frontier=frontier,
        text={} if text is None else text.description,
        left_out=runner.left_out,
        general=general,
        environment=environment(runner.task.device),
    )


def _check_sizes(
    protocol: str, edits: Sequence[int], strengths: Sequence[float], perturbed: bool, requests: int
) -> list[int]:
    """Check the settings of a protocol; return how many edits are applied at once, in order."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {protocol!r}; it is one of {', '.join(PROTOCOLS)}")
    if protocol == "single":
        if edits:
            raise ConfigError("single edits are applied alone: give numbers of edits with batched or sequential only")
        return [1]
    if strengths:
        raise ConfigError(f"strengths are for single edits: omit them with the protocol {protocol}")
    if perturbed:
        raise ConfigError(f"single edits are perturbed: omit it with the protocol {protocol}")
    if wrong := [size for size in edits if not 1 <= size <= requests]:
        raise ConfigError(
            f"there are {requests} requests, so from 1 to {requests} edits can be applied at once, not {wrong[0]}"
        )
    return sorted(set(edits)) or [requests]


def _check_abilities(task: Task, editor: EditorLike, protocol: str, abilities: bool) -> None:
    """Check that abilities can be measured, if they shall be."""
    if not abilities:
        return
    if protocol == "single":
        raise ConfigError("abilities are measured with several edits at work: use the protocol batched or sequential")
    if not (task.generates and task.causal):
        raise ConfigError("abilities are those of models that go on with a text, and this one does not: omit them")
    info = getattr(editor, "info", None)
    if info is not None and info.name == "in-context":
        raise ConfigError("in-context does not change the model, nor its abilities: omit them")


def _check_edits(task: Task, requests: Sequence[EditRequest], sizes: Sequence[int]) -> None:
    """Refuse, before hours of work, requests of which no edit is made: alone, or in batches of some sizes."""
    refuse_unreadable(task, requests)
    for size in sizes:
        for start in range(0, len(requests) - len(requests) % size, size):
            refuse_conflicts(task, requests[start : start + size])


def _total(protocol: str, sizes: Sequence[int], requests: int) -> int:
    """Return how many edits will be evaluated or, of a sequence, made."""
    return {
        "single": requests,
        "batched": sum(requests - requests % size for size in sizes),
        "sequential": max(sizes),
    }[protocol]
