"""Recipes: what it takes to measure one row of the paper's tables, or a model of today, at full size."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from remend.config import from_json, to_json
from remend.data.sources import parted
from remend.editors import Trainable
from remend.editors.config import MendConfig
from remend.editors.mend import Mend
from remend.errors import ConfigError, FileError, nearest
from remend.evaluation import Report, evaluate
from remend.reproduction.ingredients import Ingredients, Pantry, load_model, overlap
from remend.reproduction.summary import call, summary
from remend.storage import MANIFEST, write_json, write_text
from remend.training import train as train_editor
from remend.training.checkpoint import folder_of
from remend.training.config import PRESETS, TrainingConfig
from remend.training.dry_run import DryRun, dry_run
from remend.training.run import check_out

FOLDER = Path(__file__).with_name("recipes")
"""Where the recipes are that ship with the package, each in a file of its name."""
DRAWDOWNS = {"accuracy": "accuracy_drawdown", "perplexity": "perplexity_drawdown"}
"""The metric of each kind of drawdown."""

TaskKind = Literal["causal-lm", "seq2seq", "classification"]


class Published(BaseModel):
    """What the paper found, as it is printed there.

    Attributes:
        table: the number of the table.
        row: the method.
        column: the model and the task.
        edit_success: Eq. 1.
        drawdown: what an edit costs elsewhere.
        measure: in what that is counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    table: str
    row: str
    column: str
    edit_success: str
    drawdown: str
    measure: Literal["accuracy", "perplexity"]


class Recipe(BaseModel):
    """One row at full size: which model, which data, how an editor is trained and judged, and what that takes.

    Attributes:
        name: of the recipe and of its file.
        title: for people.
        paper: the row that it reproduces; None for models that the paper did not know.
        model: a hub id; None where none is published under a fixed name, and ``needs`` says what to give.
        needs: the model to be given.
        writer: whose samples are the targets of passages; None for the model itself.
        task: what kind of model it is.
        dtype: of its weights.
        train: the requests to learn from, as :func:`remend.read_source` reads them, or ``passages:FILE``.
        validation: those to validate on; None for a tenth of the training subjects.
        test: those to evaluate on.
        text: a file of passages on which perplexity is measured; None for no perplexity.
        files: for each file that these name, where it is to be had.
        train_requests: how many of the training requests are used at most; None for all.
        validation_requests: likewise of validation.
        edits: how many of the test requests are evaluated, each alone.
        preset: ``paper`` or ``default``.
        network: settings of the editor that differ from the preset's.
        training: settings of the training that do.
        modules: patterns of the matrices to edit; none for the MLPs'.
        layers: the blocks to edit; None for the preset's own choice.
        seeds: with which the row is measured; a run uses one of them.
        config: of the model, as far as memory depends on it.
        memory_gb: of weights, editor and optimiser on one GPU, in GB, as a dry run counts them; activations and what is
            kept of examples (1 GB at most) come on top.
        hours: a guess at how long a run of one seed takes.
        time_basis: how it was guessed.
        note: what differs from the paper, and what to look out for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    title: str
    paper: Published | None
    model: str | None
    needs: str | None = None
    writer: str | None = None
    task: TaskKind
    dtype: Literal["float32", "bfloat16", "float16"]
    train: str
    validation: str | None = None
    test: str
    text: str | None = None
    files: dict[str, str]
    train_requests: int | None = Field(default=None, ge=2)
    validation_requests: int | None = Field(default=None, ge=2)
    edits: int = Field(ge=1)
    preset: str
    network: dict[str, Any] = {}
    training: dict[str, Any] = {}
    modules: tuple[str, ...] = ()
    layers: str | None
    seeds: tuple[int, ...] = Field(min_length=1)
    config: dict[str, Any]
    memory_gb: float = Field(gt=0)
    hours: float = Field(gt=0)
    time_basis: str = Field(min_length=1)
    note: str

    @field_validator("train", "validation", "test")
    @classmethod
    def _is_source(cls, source: str | None) -> str | None:
        if source is not None:
            parted(source)
        return source

    @field_validator("preset")
    @classmethod
    def _is_preset(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ConfigError(f"there is no preset {preset!r}; {nearest(preset, PRESETS)}")
        return preset

    @model_validator(mode="after")
    def _holds_together(self) -> Recipe:
        self.settings()
        if self.model is None and self.needs is None:
            raise ConfigError("give a model, or say in 'needs' what has to be given")
        if self.text is not None and self.task != "causal-lm":
            raise ConfigError(f"perplexity on a text is a causal language model's; leave 'text' away with {self.task}")
        return self

    def settings(self, seed: int | None = None, max_steps: int | None = None) -> tuple[MendConfig, TrainingConfig]:
        """How the editor is made and trained: the preset with what differs.

        Args:
            seed: in place of the first of ``seeds``.
            max_steps: in place of the recipe's.

        Raises:
            ConfigError: what differs is no such setting.
        """
        network, training = PRESETS[self.preset]
        network = from_json(MendConfig, {**to_json(network), **self.network})
        training = from_json(TrainingConfig, {**to_json(training), **self.training})
        seed = self.seeds[0] if seed is None else seed
        return network, replace(training, seed=seed, max_steps=max_steps or training.max_steps)

    def counted(self) -> DryRun:
        """What would be edited and what it takes, counted from ``config`` alone: no weight is made or fetched.

        Raises:
            ModelError: it is no configuration of a language model, or there is nothing to edit.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
            network, _ = self.settings()
            return dry_run(folder, network, self.modules, self.layers, getattr(torch, self.dtype))

    def origin(self, file: str) -> str:
        """Where a file of the recipe is to be had, as a clause; empty for a file that it does not name."""
        return f" ({self.files[file]})" if file in self.files else ""


def recipes() -> dict[str, Recipe]:
    """The recipes that ship with the package, by name: the paper's rows first."""
    found = [_parsed(path.read_text(encoding="utf-8"), path.name) for path in sorted(FOLDER.glob("*.json"))]
    return {recipe.name: recipe for recipe in sorted(found, key=lambda recipe: recipe.paper is None)}


def load_recipe(name: str | Path) -> Recipe:
    """The recipe of a name, or in a file.

    Args:
        name: one of :func:`recipes`, or the path of a JSON file.

    Raises:
        ConfigError: there is none, or the file holds no recipe; the message names the key.
        FileError: the file cannot be read.
    """
    shipped = FOLDER / f"{name}.json"
    if isinstance(name, str) and shipped.parent == FOLDER and shipped.is_file():
        return _parsed(shipped.read_text(encoding="utf-8"), shipped.name)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"there is no recipe {str(name)!r}, nor a JSON file of that name with the same keys; "
            f"{nearest(str(name), recipes())}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read as UTF-8 text ({error}): give the JSON file of a recipe") from None
    return _parsed(text, str(path))


def _parsed(text: str, where: str) -> Recipe:
    """The recipe of a JSON object."""
    try:
        return Recipe.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explained(error)}") from None


def _explained(error: ValidationError) -> str:
    """What is wrong with a recipe, its first fault."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = Published.model_fields if len(place) > 1 else Recipe.model_fields
        return f"a recipe has no key {key!r}; {nearest(place[-1], known)}"
    if first["type"] == "missing":
        return f"the key {key!r} is missing; any recipe that ships with remend shows what belongs there"
    said = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return f"{key}: {said}" if key else said


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
    stopped run needs to go on.

    Args:
        recipe: what to do.
        out: a folder, new or of a run of the same recipe that was stopped.
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
        FileError: something stands in ``out`` that would be overwritten.
        RequestError: a source cannot be read.
        TrainingError: as :func:`remend.train`.
        KeyboardInterrupt: the run was interrupted; it can be gone on with.
    """
    out = Path(out)
    used = Ingredients.of(recipe, model, writer, train, validation, test, text)
    passages = used.passages()
    network, settings = recipe.settings(seed, max_steps)
    about = {"recipe": recipe.model_dump(mode="json"), "ingredients": used.to_json(), "seed": settings.seed}
    _claim(out, {**about, "limit": limit, "max_steps": max_steps}, resume)
    on_progress("loading the model")
    base, tokenizer = load_model(recipe, used.model, device)
    on_progress("reading requests")
    pantry = Pantry(recipe, used, out / "requests", device, settings.seed, limit)
    requests = pantry.requests(base, tokenizer, resume)
    goes_on = folder_of(out / "editor").exists() or (out / "editor" / MANIFEST).exists()
    editor: Trainable = train_editor(
        base,
        tokenizer,
        requests["train"],
        requests.get("validation"),
        config=settings,
        editor=Mend.for_model(base, network, recipe.modules, settings.seed, recipe.layers),
        out=out / "editor",
        resume=goes_on,
        on_progress=lambda progress: on_progress(f"training: step {progress.step}, {progress.share:.0%}"),
    )
    began = time.monotonic()
    journal = out / "report.json.partial"
    report = evaluate(
        base,
        tokenizer,
        editor,
        requests["test"],
        baselines=False,
        text=passages,
        data=used.test,
        name=recipe.name,
        journal=journal,
        resume=journal.exists(),
        on_progress=lambda done, total: on_progress(f"evaluating: {done} of {total} edits"),
    )
    took = {"training_seconds": editor.trained["seconds"], "evaluation_seconds": round(time.monotonic() - began, 1)}
    kept: dict[str, Any] = {
        "recipe": recipe.name, **used.to_json(), "seed": settings.seed, "limit": limit, "max_steps": max_steps,
        "steps": editor.trained["steps"], **took, "shared_with_training": overlap(requests),
        "command": command or call(recipe, out, used, settings.seed, limit, max_steps),
    }  # fmt: skip
    report = replace(report, settings={name: value for name, value in kept.items() if value is not None})
    report.save(out / "report.json")
    write_text(out / "summary.md", summary(recipe, report))
    return report


def _claim(out: Path, about: dict[str, Any], resume: bool) -> None:
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
            other = [name for name in about if before.get(name) != about[name]]
            raise ConfigError(
                f"{out} is of a run with another {', '.join(other)}: give the same to go on with it, or another folder"
            )
    write_json(file, about)
