"""Recipes: what it takes to measure one row of the paper's tables, or a model of today, at full size."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from remend.config import from_json, to_json
from remend.data.source_names import parted
from remend.editors.mend.config import MendConfig
from remend.errors import ConfigError, FileError, nearest
from remend.training.config import PRESETS, TrainingConfig
from remend.training.resource_estimate import ResourceEstimate, dry_run

FOLDER = Path(__file__).parent
"""Where the recipes are that ship with the package, each in a file of its name."""

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

    def counted(self) -> ResourceEstimate:
        """What would be edited and what it takes, counted from ``config`` alone: no weight is made or fetched.

        That takes seconds, so ``memory_gb`` is written down in each recipe; tests hold it against this count.

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
