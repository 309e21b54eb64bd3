"""The experiments: a cell of a table is one method on one testbed with one seed; a scale says how much is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from remend.config import Config, from_json, to_json
from remend.training.config import TrainingConfig

from .methods import METHODS


@dataclass(frozen=True)
class Cell:
    """One experiment, whose figures go into a cell of a table.

    Attributes:
        testbed: the name of the model and its requests.
        method: the name of the method.
        edits: how many edits are active at once.
        seed: of training and of the choice of test requests.
    """

    testbed: str
    method: str
    edits: int = 1
    seed: int = 0

    @property
    def id(self) -> str:
        """The name that ``--cell`` takes: ``facts/mend/125/0``."""
        return f"{self.testbed}/{self.method}/{self.edits}/{self.seed}"

    @staticmethod
    def parse(name: str) -> Cell | None:
        """Return the cell of an id; None if the text is no id."""
        parts = name.split("/")
        if len(parts) != 4 or parts[1] not in METHODS or not (parts[2].isdecimal() and parts[3].isdecimal()):
            return None
        return Cell(parts[0], parts[1], int(parts[2]), int(parts[3]))


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes:
        seeds: how many times each cell is measured.
        requests: test requests of a cell of single edits.
        steps: of every training, at most.
        train: requests of every training, at most; a tenth as many for validation.
        many: test requests of a cell of several edits at once, unless one batch of edits is more.
        text_tokens: how many tokens perplexity is measured on.
        memory: widths of the models whose training memory is measured.
    """

    seeds: int = 3
    requests: int = 100
    steps: int = 1_000
    train: int = 100_000
    many: int = 125
    text_tokens: int = 256
    memory: Sequence[int] = field(default=(128, 256, 512, 768))


FULL = Scale()
QUICK = Scale(seeds=1, requests=12, steps=40, train=320, many=25, text_tokens=64, memory=(64, 128))


def training_config(cell: Cell, scale: Scale) -> TrainingConfig | None:
    """Return how a cell's editor is trained; None if it is not."""
    config = METHODS[cell.method].training
    if config is None:
        return None
    steps = min(config.max_steps, scale.steps)
    # Patience as long as the training: every method gets the same number of steps.
    return replace(config, seed=cell.seed, max_steps=steps, patience=steps, validate_every=max(1, steps // 6))


def cell_settings(cell: Cell, scale: Scale) -> dict[str, Any]:
    """Return what determines a cell's figures beside its id, its testbed and the scale, as a JSON object."""
    method, training = METHODS[cell.method], training_config(cell, scale)
    # The keys are those of stored results: with other keys, results of earlier runs would count as outdated.
    return {
        "editor": method.editor,
        "attention": method.attention,
        "keeps": method.uses_locality,
        "config": None if method.config is None else to_json(method.config),
        "training": None if training is None else to_json(training),
    }


def current_settings(cell: Cell, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that :func:`cell_settings` gave in an earlier version as this version would write them.

    Raises:
        ConfigError: this version cannot read them.
    """
    method = METHODS[cell.method]
    return {
        **stored,
        "config": current_json(method.config, stored.get("config")),
        "training": current_json(method.training, stored.get("training")),
    }


def current_json(config: Config | None, stored: Mapping[str, Any] | None) -> Any:
    """Return the stored JSON of a configuration of the same class as ``config`` as this version would write it."""
    # Reading it gives fields that were added since their defaults, so that older results stay valid.
    return stored if config is None or stored is None else to_json(from_json(type(config), stored))
