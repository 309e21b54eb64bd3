"""The editors that the tables compare, each with its settings and its training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from remend.editors.enn import EnnConfig
from remend.editors.finetune import FineTune, FineTuneConfig, FineTuneLocal
from remend.editors.ke import KeConfig
from remend.editors.locate_then_edit.memit import MemitConfig
from remend.editors.locate_then_edit.rome import RomeConfig
from remend.editors.lookup import LookupConfig
from remend.editors.mend.config import MendConfig
from remend.editors.ridge import RidgeConfig
from remend.training.config import PRESETS, TrainingConfig

PAPER_MEND = MendConfig(rank=384, relative=True, alpha=0.1)
"""MEND as in the paper, for models of this size. The rank is about half of the sum of a matrix's dimensions, as the
paper's 1,920 is for distilGPT-2. Step sizes are relative, so that one initial value suits every model."""

PAPER_TRAINING = TrainingConfig(
    batch_size=10, learning_rate=3e-4, alpha_learning_rate=5e-3, decay=True, max_steps=1_000
)
"""The paper's outer loop (c_e = 0.1, random locality examples), with learning rates for models of this size."""

DEFAULT_TRAINING = replace(PRESETS["default"][1], max_steps=1_000)
"""The outer loop of the preset ``default``: eight of ten locality examples are near negatives."""

GATE = 0.1
"""A gated edit does not act where its response is below this share of the response at its own prompt. The value was
chosen on the atlas's validation split."""


@dataclass(frozen=True)
class Method:
    """An editor with its settings: one row of a table.

    Attributes:
        editor: its name in :data:`remend.editors.EDITORS`.
        title: the heading of its row.
        config: its settings; None if it has none.
        training: how it is trained; None if it is not.
        attention: whether it edits attention matrices in place of the MLPs'.
        uses_locality: whether it gets locality examples at edit time (FT+KL).
        uses_text: whether it gets sentences that the model learned from, for statistics of the model's inputs.
    """

    editor: str
    title: str
    config: Any = None
    training: TrainingConfig | None = None
    attention: bool = False
    uses_locality: bool = False
    uses_text: bool = False


METHODS: dict[str, Method] = {
    "ft": Method("finetune", "FT", FineTune.default_config()),
    "ft-kl": Method("finetune", "FT+KL", FineTuneConfig(kl_weight=1.0), uses_locality=True),
    "ft-local": Method("finetune-local", "finetune-local", FineTuneLocal.default_config()),
    # The learning rates of KE and ENN are the best that benchmarks/tune_baselines.py found; KE's is the preset's.
    "ke": Method("ke", "KE", KeConfig(), DEFAULT_TRAINING),
    "enn": Method("enn", "ENN", EnnConfig(), replace(DEFAULT_TRAINING, learning_rate=2e-3)),
    "mend-paper": Method("mend", "MEND, as published", PAPER_MEND, PAPER_TRAINING),
    "mend": Method("mend", "MEND, `default`", PRESETS["default"][0], DEFAULT_TRAINING),
    "ridge": Method("ridge", "ridge", RidgeConfig()),
    "ridge-gate": Method("ridge", "ridge, gated", RidgeConfig(strength=1.5, gate=0.4)),
    "rome": Method("rome", "ROME", RomeConfig(), uses_text=True),
    "memit": Method("memit", "MEMIT", MemitConfig(), uses_text=True),
    "cache": Method("lookup", "cache", LookupConfig(), uses_text=True),
    "in-context": Method("in-context", "in context"),
    "mend-sum": Method(
        "mend", "MEND, `default`, summed", replace(PRESETS["default"][0], aggregate="sum"), DEFAULT_TRAINING
    ),
    "mend-gate": Method("mend", "MEND, `default`, gated", replace(PRESETS["default"][0], gate=GATE), DEFAULT_TRAINING),
    "no-sharing": Method("mend", "no sharing", replace(PAPER_MEND, share=False), PAPER_TRAINING),
    "no-norm": Method("mend", "no norm", replace(PAPER_MEND, normalise=False), PAPER_TRAINING),
    "no-identity": Method("mend", "no identity init", replace(PAPER_MEND, identity=False), PAPER_TRAINING),
    "only-u": Method("mend", "only u", replace(PAPER_MEND, transforms="u"), PAPER_TRAINING),
    "only-delta": Method("mend", "only δ", replace(PAPER_MEND, transforms="delta"), PAPER_TRAINING),
    "only-smaller": Method("mend", "only the smaller", replace(PAPER_MEND, transforms="smaller"), PAPER_TRAINING),
    "attention": Method("mend", "attention", PAPER_MEND, PAPER_TRAINING, attention=True),
}
"""Every method of the tables, by the name that cells have for it."""

SAME_TRAINING = {"mend-sum": "mend", "mend-gate": "mend"}
"""Methods that use the trained editor of another one, with their own settings at edit time."""
