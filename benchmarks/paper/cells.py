"""What is measured: one editor on one world, with one seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from remend.config import to_json
from remend.editors.enn import EnnConfig
from remend.editors.finetune import FineTune, FineTuneConfig, FineTuneLocal
from remend.editors.ke import KeConfig
from remend.editors.locate_then_edit.editors import MemitConfig, RomeConfig
from remend.editors.lookup import LookupConfig
from remend.editors.mend.config import MendConfig
from remend.editors.ridge import RidgeConfig
from remend.training.config import PRESETS, TrainingConfig

FAITHFUL = MendConfig(rank=384, relative=True, alpha=0.1)
"""MEND as the paper has it, for models of this size: the rank is about half of a matrix's two dimensions together, as
the paper's 1,920 is for distilGPT-2, and step sizes are in units in which one start suits every model."""

AS_PUBLISHED = TrainingConfig(batch_size=10, learning_rate=3e-4, alpha_learning_rate=5e-3, decay=True, max_steps=1_000)
"""The paper's outer loop (c_e = 0.1, random locality examples), with learning rates for models of this size."""

WITH_NEAR = replace(PRESETS["default"][1], max_steps=1_000)
"""The outer loop of ``default``: eight of ten locality examples are near negatives."""

GATE = 0.1
"""Below this share of its own answer a gated edit does not act; chosen on the atlas's validation split."""


@dataclass(frozen=True)
class Method:
    """An editor with its settings.

    Attributes:
        editor: its name among :data:`remend.editors.EDITORS`.
        title: how tables call it.
        config: its settings; None if it has none.
        training: how it is trained, if it is.
        attention: whether attention's matrices are edited in place of the MLPs'.
        keeps: whether it is given locality examples at edit time (FT+KL).
        reads: whether it measures sentences that the model learned from.
    """

    editor: str
    title: str
    config: Any = None
    training: TrainingConfig | None = None
    attention: bool = False
    keeps: bool = False
    reads: bool = False


METHODS: dict[str, Method] = {
    "ft": Method("finetune", "FT", FineTune.default()),
    "ft-kl": Method("finetune", "FT+KL", FineTuneConfig(kl_weight=1.0), keeps=True),
    "ft-local": Method("finetune-local", "finetune-local", FineTuneLocal.default()),
    "ke": Method("ke", "KE", KeConfig(), WITH_NEAR),
    "enn": Method("enn", "ENN", EnnConfig(), replace(WITH_NEAR, learning_rate=2e-3)),  # benchmarks/rivals.py
    "mend-paper": Method("mend", "MEND, as published", FAITHFUL, AS_PUBLISHED),
    "mend": Method("mend", "MEND, `default`", PRESETS["default"][0], WITH_NEAR),
    "ridge": Method("ridge", "ridge", RidgeConfig()),
    "ridge-gate": Method("ridge", "ridge, gated", RidgeConfig(strength=1.5, gate=0.4)),
    "rome": Method("rome", "ROME", RomeConfig(), reads=True),
    "memit": Method("memit", "MEMIT", MemitConfig(), reads=True),
    "cache": Method("cache", "cache", LookupConfig(), reads=True),
    "in-context": Method("in-context", "in context"),
    "mend-sum": Method("mend", "MEND, `default`, summed", replace(PRESETS["default"][0], aggregate="sum"), WITH_NEAR),
    "mend-gate": Method("mend", "MEND, `default`, gated", replace(PRESETS["default"][0], gate=GATE), WITH_NEAR),
    "no-sharing": Method("mend", "no sharing", replace(FAITHFUL, share=False), AS_PUBLISHED),
    "no-norm": Method("mend", "no norm", replace(FAITHFUL, normalise=False), AS_PUBLISHED),
    "no-identity": Method("mend", "no identity init", replace(FAITHFUL, identity=False), AS_PUBLISHED),
    "only-u": Method("mend", "only u", replace(FAITHFUL, transforms="u"), AS_PUBLISHED),
    "only-delta": Method("mend", "only δ", replace(FAITHFUL, transforms="delta"), AS_PUBLISHED),
    "only-smaller": Method("mend", "only the smaller", replace(FAITHFUL, transforms="smaller"), AS_PUBLISHED),
    "attention": Method("mend", "attention", FAITHFUL, AS_PUBLISHED, attention=True),
}
"""Every editor of the tables."""

SAME_TRAINING = {"mend-sum": "mend", "mend-gate": "mend"}
"""Methods that only use another's trained editor, with their own settings."""


@dataclass(frozen=True)
class Cell:
    """One number's worth of work.

    Attributes:
        world: on which model.
        method: with which editor.
        edits: how many edits are at work at once.
        seed: of training and of the choice of test requests.
    """

    world: str
    method: str
    edits: int = 1
    seed: int = 0

    @property
    def id(self) -> str:
        """Its name, with which it is computed by itself."""
        return f"{self.world}/{self.method}/{self.edits}/{self.seed}"

    @staticmethod
    def parse(name: str) -> Cell | None:
        """The cell of a name, if it is one."""
        parts = name.split("/")
        if len(parts) != 4 or parts[1] not in METHODS or not (parts[2].isdecimal() and parts[3].isdecimal()):
            return None
        return Cell(parts[0], parts[1], int(parts[2]), int(parts[3]))


@dataclass(frozen=True)
class Scale:
    """How much of everything is computed.

    Attributes:
        seeds: how many times each cell is measured.
        requests: test requests of each, of single edits.
        steps: of every training, at most.
        train: requests of every training, at most; a tenth as many for validation.
        many: test requests of each, of several edits at once: or one batch of them, if that is more.
        text_tokens: on which perplexity is measured.
        memory: widths of the models whose training memory is measured.
    """

    seeds: int = 3
    requests: int = 100
    steps: int = 1_000
    train: int = 100_000
    many: int = 125
    text_tokens: int = 256
    memory: Sequence[int] = field(default=(128, 256, 512, 768))


def training_of(cell: Cell, scale: Scale) -> TrainingConfig | None:
    """How a cell's editor is trained; None if it is not."""
    config = METHODS[cell.method].training
    if config is None:
        return None
    steps = min(config.max_steps, scale.steps)
    return replace(config, seed=cell.seed, max_steps=steps, patience=steps, validate_every=max(1, steps // 6))


def settings_of(cell: Cell, scale: Scale) -> dict[str, Any]:
    """What determines a cell's figures beside its name, its world and the scale, as a JSON object."""
    method, training = METHODS[cell.method], training_of(cell, scale)
    return {
        "editor": method.editor,
        "attention": method.attention,
        "keeps": method.keeps,
        "config": None if method.config is None else to_json(method.config),
        "training": None if training is None else to_json(training),
    }


FULL = Scale()
QUICK = Scale(seeds=1, requests=12, steps=40, train=320, many=25, text_tokens=64, memory=(64, 128))

Progress = Callable[[str], None]
