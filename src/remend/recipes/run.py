"""Run a recipe: load the model and data, train an editor, evaluate its edits, and continue a run that was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from remend.config import differences
from remend.editors import TrainableEditor
from remend.editors.mend.editor import Mend
from remend.errors import ConfigError, FileError
from remend.evaluation import Report, evaluate
from remend.evaluation.checkpoint import remove_parts
from remend.evaluation.reports.report_reader import read_report
from remend.recipes.inputs import RequestLoader, RunInputs, load_model, shared_with_training
from remend.recipes.recipe import Recipe
from remend.recipes.summary import python_call, summarize
from remend.saved_folders import MANIFEST, parse_json, write_json, write_text
from remend.training import checkpoint
from remend.training import train as train_editor
from remend.training.training_run import check_out

REPORT_FILE, SUMMARY_FILE = "report.json", "summary.md"
PARTIAL_REPORT = "report.json.partial"
"""The results so far of an evaluation that was stopped."""


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    model: str | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    text: str | None = None,
    writer: str | None = None,
    device: str = "auto",
    seed: int | None = None,
    limit: int | None = None,
    max_steps: int | None = None,
    resume: bool = True,
    command: str | None = None,
    on_progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Train an editor as a recipe says, evaluate its edits one by one, and write the results to a folder.

    The folder ``out`` then holds ``editor``, ``report.json``, ``summary.md`` (beside the paper's figures), and what a
    stopped run needs to continue. If the run has ended before, its report is read and nothing is computed.

    Args:
        recipe: what to train and evaluate.
        out: a new folder, or that of the same run.
        model: a folder or hub id, in place of the recipe's.
        train: a source of requests, in place of the recipe's.
        validation: a source of requests, in place of the recipe's.
        test: a source of requests, in place of the recipe's.
        text: a file of passages, in place of the recipe's.
        writer: the model whose samples are the targets of passages, in place of the recipe's.
        device: as for :func:`remend.load`.
        seed: in place of the first of the recipe's.
        limit: at most so many requests of each split, to try a recipe out.
        max_steps: of training, in place of the recipe's, to try a recipe out.
        resume: whether to continue with what is in ``out``.
        command: the command line for the summary; by default the call in Python.
        on_progress: called with a short text at each stage.

    Raises:
        ConfigError: inputs are missing, the model is of another kind, or ``out`` belongs to another run.
        FileError: ``out`` holds a file that would be overwritten, or that is damaged.
        RequestError: a source cannot be read.
        TrainingError: as :func:`remend.train`.
        KeyboardInterrupt: the run was interrupted; the same call continues it.
    """
    out = Path(out)
    inputs = RunInputs.resolve(
        recipe, model=model, writer=writer, train=train, validation=validation, test=test, text=text
    )
    passages = inputs.passages()
    network, settings = recipe.settings(seed, max_steps)
    run_settings = {"recipe": recipe.model_dump(mode="json"), "inputs": inputs.to_json(), "seed": settings.seed}
    run_settings |= {"limit": limit, "max_steps": max_steps}
    _check_folder(out, run_settings, resume)
    resumable = checkpoint.exist(out / "editor") or (out / "editor" / MANIFEST).exists()
    if not resumable:  # the editor was deleted, so these are results of another one
        remove_parts(out / PARTIAL_REPORT)
        (out / REPORT_FILE).unlink(missing_ok=True)
    if (out / REPORT_FILE).exists():
        remove_parts(out / PARTIAL_REPORT)  # the process may have been killed before it did
        return read_report(out / REPORT_FILE)
    on_progress("loading the model")
    task = load_model(recipe, inputs.model, device)
    on_progress("reading requests")
    # Only after the model has loaded: a run that fails before that must not claim the folder.
    write_json(out / "run.json", run_settings)
    loader = RequestLoader(recipe, inputs, out / "requests", device, settings.seed, limit)
    requests = loader.load(task, resume)
    editor: TrainableEditor = train_editor(
        task, requests["train"], requests.get("validation"),
        config=settings,
        editor=Mend.create(task, network, modules=recipe.modules, seed=settings.seed, layers=recipe.layers),
        out=out / "editor", resume=resumable,
        on_progress=lambda progress: on_progress(f"training: step {progress.step}, {progress.share:.0%}"),
    )  # fmt: skip
    start = time.monotonic()

    def finish(report: Report) -> Report:
        details: dict[str, Any] = {
            "recipe": recipe.name, **inputs.to_json(), "seed": settings.seed, "limit": limit, "max_steps": max_steps,
            "steps": editor.trained["steps"], "training_seconds": editor.trained["seconds"],
            "evaluation_seconds": round(time.monotonic() - start, 1),
            "shared_with_training": shared_with_training(requests),
            "command": command or python_call(recipe, out, inputs, settings.seed, limit, max_steps),
        }  # fmt: skip
        report = replace(report, settings={name: value for name, value in details.items() if value is not None})
        write_text(out / SUMMARY_FILE, summarize(recipe, report))
        report.save(out / REPORT_FILE)  # last, because its presence says that the run has ended
        return report

    return evaluate(
        task, editor, requests["test"],
        baselines=False, text=passages, data=inputs.test, name=recipe.name,
        checkpoint=out / PARTIAL_REPORT, resume=resumable and (out / PARTIAL_REPORT).exists(),
        on_progress=lambda done, total: on_progress(f"evaluating: {done} of {total} edits"), on_report=finish,
    )  # fmt: skip


def _check_folder(out: Path, run_settings: dict[str, Any], resume: bool) -> None:
    """Make sure that a folder is new, or belongs to the same run.

    Raises:
        ConfigError: it belongs to another run.
        FileError: it belongs to a run, and ``resume`` is false; or it holds files of the user.
    """
    check_out(out / "editor", resume)
    file = out / "run.json"
    others = [name for name in (REPORT_FILE, SUMMARY_FILE, PARTIAL_REPORT) if (out / name).exists()]
    if others and not file.exists():
        raise FileError(f"{out} holds {', '.join(others)}, of no run of a recipe: choose another folder")
    if resume and file.exists():
        try:
            before = parse_json(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise FileError(f"{file} is damaged ({error}): choose another folder") from None
        before.setdefault("inputs", before.pop("ingredients", {}))  # the key's earlier name
        if changed := differences(before, run_settings):
            names = ", ".join(name.removeprefix("inputs.") for name in changed)
            raise ConfigError(
                f"{out} is of a run with another {names}: give the same to go on with it, or another folder"
            )
