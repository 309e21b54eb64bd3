"""``TrainingConfig`` and ``Resources``: the settings of a training run, with the presets ``paper`` and ``default``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from remend.config import Config, Share
from remend.editors.mend.config import MendConfig
from remend.errors import ConfigError


@dataclass(frozen=True)
class TrainingConfig(Config):
    """Settings of the training of an editor; the defaults are the paper's (section 5, appendix B).

    Attributes:
        edit_weight: c_e, the weight of the edit loss beside the locality loss (Eq. 4).
        batch_size: the number of episodes in a step.
        learning_rate: Adam's, for the editor networks.
        alpha_learning_rate: Adam's, for the step sizes α.
        near: the share of locality examples that are near negatives: the request's ``near``, or mined where it has none
            (:mod:`remend.training.negative_mining`). The rest is unrelated (the paper has only these).
        in_batch: the share that are other edit prompts of the same batch, of the same relation where requests name one.
        hardest: the number of locality examples drawn for each episode; the one that the edit disturbs most is used.
        decay: whether both learning rates fall linearly to zero at the end of the run (of its steps or its seconds).
        gradient_clip: the largest norm of the gradient of all parameters together.
        max_steps: the number of steps after which the run ends at the latest.
        patience: the number of steps without a lower validation loss after which it ends.
        validate_every: the number of steps between validations.
        validation_size: the largest number of validation requests that are used.
        seed: the seed of initial weights, the order of the data and every random draw.
    """

    edit_weight: PositiveFloat = 0.1
    batch_size: PositiveInt = 10
    learning_rate: PositiveFloat = 1e-6
    alpha_learning_rate: PositiveFloat = 1e-4
    near: Share = 0.0
    in_batch: Share = 0.0
    hardest: PositiveInt = 1
    decay: bool = False
    gradient_clip: PositiveFloat = 100.0
    max_steps: PositiveInt = 500_000
    patience: PositiveInt = 20_000
    validate_every: PositiveInt = 1_000
    validation_size: PositiveInt = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.near + self.in_batch > 1:
            raise ConfigError(f"near and in_batch are shares of a whole, not {self.near} and {self.in_batch}")


@dataclass(frozen=True)
class Resources(Config):
    """How a run uses memory and precision. Apart from rounding, nothing here changes the result.

    Attributes:
        micro_batch: the number of episodes that go through the edited model together; by default as many as fit
            ``memory``.
        memory: the GB that training may take in all, including the loaded model; by default what the device has free.
        cache: the GB of the activation cache: hidden states of the examples, then gradient factors.
        cache_folder: a folder in which hidden states are cached on disk too, also for later runs.
        recompute: whether activations above the cut are recomputed in the backward pass (activation checkpointing).
        precision: of matrix products: ``float32``; ``tf32`` (on GPUs that have it); ``bfloat16``. Parameters,
            statistics and sums stay float32.
    """

    micro_batch: PositiveInt | None = None
    memory: PositiveFloat | None = None
    cache: NonNegativeFloat = 1.0
    cache_folder: Path | None = None
    recompute: bool = False
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the matrix products of a float32 base model; None for float32."""
        return torch.bfloat16 if self.precision == "bfloat16" else None

    @contextmanager
    def matmul_precision(self) -> Iterator[None]:
        """Let CUDA multiply float32 matrices in TF32 inside the block, if ``precision`` says so."""
        before = torch.backends.cuda.matmul.allow_tf32
        if self.precision == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the matrix products of the editor networks."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


# The default differs from the paper where that makes an editor learn sooner, on any model: whitened inputs,
# steps in units of the layer's own output, and learning rates that suit Xavier-scaled networks and end at zero.
# Chosen on the atlas's validation split; the paper trains for up to 500,000 steps.
PRESETS: dict[str, tuple[MendConfig, TrainingConfig]] = {
    "paper": (MendConfig(), TrainingConfig()),
    "default": (
        MendConfig(
            rank=256,
            alpha=0.5,
            ridge=1e-4,
            relative=True,
            outputs_only=True,
            tokens="target",
            limit=4.0,
            contrast=1.0,
            ordinary=1.0,
            settle=2.0,
            aggregate="least-squares",
        ),
        TrainingConfig(
            near=0.8,
            edit_weight=1.0,
            batch_size=16,
            learning_rate=5e-4,
            alpha_learning_rate=5e-3,
            decay=True,
            max_steps=3_000,
            patience=3_000,
            validate_every=300,
            validation_size=300,
        ),
    ),
}
