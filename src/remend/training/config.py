"""Settings of a training run, and the two presets."""

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
    """How an editor is trained; the defaults are the paper's (section 5, appendix B).

    Attributes:
        edit_weight: c_e, the weight of the edit's loss beside the locality loss (Eq. 4).
        batch_size: episodes a step.
        learning_rate: Adam's, for the editor networks.
        alpha_learning_rate: Adam's, for the step sizes α.
        near: the share of locality examples that are near negatives: of the request's own ``near``, or mined where it
            has none (:mod:`remend.training.negative_mining`); the rest is unrelated (the paper has only these).
        in_batch: the share that are other edit prompts of the same batch, of the same relation where requests name one.
        hardest: how many locality examples are drawn for each episode; the one that the edit disturbs most is used.
        decay: whether both fall linearly to zero at the end of the run (of its steps or its seconds).
        gradient_clip: the largest norm of the gradient of all parameters together.
        max_steps: the run ends after this many steps at the latest.
        patience: it ends when the validation loss has not fallen for this many steps.
        validate_every: steps between validations.
        validation_size: how many validation requests are used.
        seed: of initial weights, the order of the data and every draw.
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
    """How a run uses the machine it is on. Nothing here changes what is computed, but for rounding.

    Attributes:
        micro_batch: episodes that go through the edited model together; by default as many as fit ``memory``.
        memory: GB that training may take in all, the loaded model included; by default what the device has free.
        cache: GB in which constants of the examples are kept (hidden states, then gradient factors).
        cache_folder: where hidden states are kept on disk too, for as long as the folder is.
        recompute: whether activations above the cut are computed again for the backward pass, not kept.
        precision: of matrix products: ``float32``; ``tf32`` (on GPUs that have it); ``bfloat16``. Parameters,
            statistics and what is summed stay float32.
    """

    micro_batch: PositiveInt | None = None
    memory: PositiveFloat | None = None
    cache: NonNegativeFloat = 1.0
    cache_folder: Path | None = None
    recompute: bool = False
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    @property
    def autocast(self) -> torch.dtype | None:
        """In which a float32 base model's products are taken, if not in float32."""
        return torch.bfloat16 if self.precision == "bfloat16" else None

    @contextmanager
    def products(self) -> Iterator[None]:
        """Within the block, CUDA multiplies float32 matrices as ``precision`` says; elsewhere nothing changes."""
        before = torch.backends.cuda.matmul.allow_tf32
        if self.precision == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    @property
    def product_dtype(self) -> torch.dtype:
        """In which the editor networks' products are taken."""
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
