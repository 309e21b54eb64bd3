"""A recipe: the model, the data and the settings of one row of the paper's tables, or of a recent model, at full size.

The recipes that ship are the JSON files in this folder. Users write their own with the same keys.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from remend.config import from_json, to_json
from remend.data.source_names import parse_source_name
from remend.editors.mend.config import MendConfig
from remend.errors import ConfigError, FileError, nearest
from remend.training.config import PRESETS, TrainingConfig

RECIPE_FOLDER = Path(__file__).parent
"""The recipes that ship with the package, each in a JSON file of its name."""

TaskKind = Literal["causal-lm", "seq2seq", "classification"]


class Published(BaseModel):
    """The paper's figures, as printed there.

    Attributes:
        table: the number of the table.
        row: the method.
        column: the model and the task.
        edit_success: Eq. 1.
        drawdown: how much worse the model answers elsewhere.
        measure: of what the drawdown is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    table: str
    row: str
    column: str
    edit_success: str
    drawdown: str
    measure: Literal["accuracy", "perplexity"]


class Recipe(BaseModel):
    """The model, the data, how an editor is trained and evaluated, and what that takes.

    Attributes:
        name: of the recipe and of its file.
        title: the heading of the summary.
        paper: the row that it reproduces; None for models that the paper does not have.
        model: a hub id; None where none is published under a fixed name; ``needs`` then says what to give.
        needs: a description of the model that the user has to give.
        writer: the model whose samples are the targets of passages; None for the edited model.
        task: what kind of model it is.
        dtype: of its weights.
        train: the source of the training requests, as :func:`remend.read_source` reads it, or ``passages:FILE``.
        validation: the source of the validation requests; None for a tenth of the training subjects.
        test: the source of the requests to evaluate.
        text: a file of passages on which perplexity is measured; None for no perplexity.
        files: for each file that these name, where to get it.
        train_requests: at most so many training requests; None for all.
        validation_requests: at most so many validation requests; None for all.
        edits: at most so many test requests, each evaluated alone.
        preset: ``paper`` or ``default``.
        network: settings of the editor that differ from the preset's.
        training: settings of training that differ from the preset's.
        modules: patterns of the matrices to edit; empty for those of the MLPs.
        layers: the blocks to edit; None for the preset's.
        seeds: those with which the row is measured; a run uses one of them.
        config: the model's configuration, as far as memory depends on it.
        memory_gb: weights, editor and optimizer on one GPU, in GB, as a dry run counts them; activations and stored
            examples (1 GB at most) come on top.
        hours: an estimate of the time of a run with one seed.
        time_basis: how the time was estimated.
        note: what differs from the paper.
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
            parse_source_name(source)
        return source

    @field_validator("config")
    @classmethod
    def _is_finite(cls, config: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(config, allow_nan=False)
        except ValueError:
            raise ConfigError("a number in the model's configuration is not finite") from None
        return config

    @field_validator("preset")
    @classmethod
    def _is_preset(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ConfigError(f"there is no preset {preset!r}; {nearest(preset, PRESETS)}")
        return preset

    @model_validator(mode="after")
    def _is_consistent(self) -> Recipe:
        self.settings()
        if self.model is None and self.needs is None:
            raise ConfigError("give a model, or say in 'needs' what has to be given")
        if self.text is not None and self.task != "causal-lm":
            raise ConfigError(
                f"perplexity is measured only for causal language models; leave 'text' away with {self.task}"
            )
        return self

    def settings(self, seed: int | None = None, max_steps: int | None = None) -> tuple[MendConfig, TrainingConfig]:
        """Return the settings of the editor and of training: the preset's with the recipe's changes.

        Args:
            seed: in place of the first of ``seeds``.
            max_steps: in place of the recipe's.

        Raises:
            ConfigError: the recipe changes a setting that does not exist.
        """
        network, training = PRESETS[self.preset]
        network = from_json(MendConfig, {**to_json(network), **self.network})
        training = from_json(TrainingConfig, {**to_json(training), **self.training})
        seed = self.seeds[0] if seed is None else seed
        return network, replace(training, seed=seed, max_steps=max_steps or training.max_steps)

    def origin(self, file: str) -> str:
        """Return where to get a file of the recipe, in brackets; empty for a file that it does not name."""
        return f" ({self.files[file]})" if file in self.files else ""


def recipes() -> dict[str, Recipe]:
    """Return the recipes that ship with the package, by name: the paper's rows first."""
    parsed = [_parse(path.read_text(encoding="utf-8"), path.name) for path in sorted(RECIPE_FOLDER.glob("*.json"))]
    return {recipe.name: recipe for recipe in sorted(parsed, key=lambda recipe: recipe.paper is None)}


def load_recipe(name: str | Path) -> Recipe:
    """Load a recipe by its name, or from a file.

    Args:
        name: one of :func:`recipes`, or the path of a JSON file.

    Raises:
        ConfigError: there is none, or the file holds no valid recipe; the message names the key.
        FileError: the file cannot be read.
    """
    shipped = RECIPE_FOLDER / f"{name}.json"
    if isinstance(name, str) and shipped.parent == RECIPE_FOLDER and shipped.is_file():
        return _parse(shipped.read_text(encoding="utf-8"), shipped.name)
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
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Recipe:
    """Validate the JSON text of a recipe; ``where`` names it in messages."""
    try:
        return Recipe.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_fault(error)}") from None


def _first_fault(error: ValidationError) -> str:
    """Say what is wrong with a recipe: its first fault only."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = Published.model_fields if len(path) > 1 else Recipe.model_fields
        return f"a recipe has no key {key!r}; {nearest(path[-1], known)}"
    if first["type"] == "missing":
        return f"the key {key!r} is missing; remend recipe show NAME prints a recipe that has it"
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return f"{key}: {message}" if key else message
