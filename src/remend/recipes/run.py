"""Running a recipe: training an editor, judging it, and going on with a run that was stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from remend.config import differences
from remend.editors import Trainable
from remend.editors.mend.editor import Mend
from remend.errors import ConfigError
from remend.evaluation import Report, evaluate
from remend.evaluation.reports.schema import read_report
from remend.recipes.inputs import Ingredients, Pantry, load_model, overlap
from remend.recipes.recipe import Recipe
from remend.recipes.summary import call, summary
from remend.serialization import MANIFEST, write_json, write_text
from remend.training import train as train_editor
from remend.training.checkpoint import folder_of
from remend.training.loop import check_out

REPORT = "report.json"
JOURNAL = "report.json.partial"
"""What was found so far, of an evaluation that was stopped."""


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
    """Train an editor as a recipe says, make its edits one by one, and write down what was found.

    In the folder ``out`` are then ``editor``, ``report.json``, ``summary.md`` (beside the paper's figures), and what a
    stopped run needs to go on. Of a run that had ended, the report is read, and nothing is done again.

    Args:
        recipe: what to do.
        out: a folder, new or of the same run.
        model: a folder or hub id, in place of the recipe's.
        train: a source of requests, in place of the recipe's.
        validation: likewise.
        test: likewise.
        text: a file of passages, in place of the recipe's.
        writer: the model whose samples are the targets of passages, in place of the recipe's.
        device: as for :func:`remend.load`.
        seed: in place of the first of the recipe's.
        limit: at most so many requests of each split: to try a recipe out.
        max_steps: of training, in place of the recipe's: likewise.
        resume: whether to go on with what is in ``out``.
        command: what was typed, for the summary; the call itself by default.
        on_progress: is told what is being done.

    Raises:
        ConfigError: something has to be given and was not, the model is of another kind, or ``out`` is of another run.
        FileError: something stands in ``out`` that would be overwritten, or is damaged.
        RequestError: a source cannot be read.
        TrainingError: as :func:`remend.train`.
        KeyboardInterrupt: the run was interrupted; it can be gone on with.
    """
    out = Path(out)
    used = Ingredients.of(recipe, model, writer, train, validation, test, text)
    passages = used.passages()
    network, settings = recipe.settings(seed, max_steps)
    about = {"recipe": recipe.model_dump(mode="json"), "ingredients": used.to_json(), "seed": settings.seed}
    about |= {"limit": limit, "max_steps": max_steps}
    _refuse_other(out, about, resume)
    goes_on = folder_of(out / "editor").exists() or (out / "editor" / MANIFEST).exists()
    if not goes_on:  # what is left here is of another editor, which was deleted
        shutil.rmtree(out / JOURNAL, ignore_errors=True)
        (out / REPORT).unlink(missing_ok=True)
    if (out / REPORT).exists():
        return read_report(out / REPORT)
    on_progress("loading the model")
    base, tokenizer = load_model(recipe, used.model, device)
    on_progress("reading requests")
    write_json(out / "run.json", about)  # only now: what could not even begin blocks no folder
    requests = Pantry(recipe, used, out / "requests", device, settings.seed, limit).requests(base, tokenizer, resume)
    editor: Trainable = train_editor(
        base, tokenizer, requests["train"], requests.get("validation"),
        config=settings, editor=Mend.for_model(base, network, recipe.modules, settings.seed, recipe.layers),
        out=out / "editor", resume=goes_on,
        on_progress=lambda progress: on_progress(f"training: step {progress.step}, {progress.share:.0%}"),
    )  # fmt: skip
    began = time.monotonic()
    report = evaluate(
        base, tokenizer, editor, requests["test"],
        baselines=False, text=passages, data=used.test, name=recipe.name,
        journal=out / JOURNAL, resume=goes_on and (out / JOURNAL).exists(),
        on_progress=lambda done, total: on_progress(f"evaluating: {done} of {total} edits"),
    )  # fmt: skip
    kept: dict[str, Any] = {
        "recipe": recipe.name, **used.to_json(), "seed": settings.seed, "limit": limit, "max_steps": max_steps,
        "steps": editor.trained["steps"], "training_seconds": editor.trained["seconds"],
        "evaluation_seconds": round(time.monotonic() - began, 1), "shared_with_training": overlap(requests),
        "command": command or call(recipe, out, used, settings.seed, limit, max_steps),
    }  # fmt: skip
    report = replace(report, settings={name: value for name, value in kept.items() if value is not None})
    write_text(out / "summary.md", summary(recipe, report))
    report.save(out / REPORT)  # last: it says that the run has ended
    return report


def _refuse_other(out: Path, about: dict[str, Any], resume: bool) -> None:
    """Make sure that a folder is of this run, or of none yet.

    Raises:
        ConfigError: it is of another run.
        FileError: it is of a run, and not to be gone on with.
    """
    check_out(out / "editor", resume)
    file = out / "run.json"
    if resume and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != about:
            other = ", ".join(name.removeprefix("ingredients.") for name in differences(before, about))
            raise ConfigError(
                f"{out} is of a run with another {other}: give the same to go on with it, or another folder"
            )
