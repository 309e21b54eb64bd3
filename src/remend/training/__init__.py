"""Training an editor: the outer loop of the paper's algorithm 1."""

from remend.training.config import PRESETS, TrainingConfig
from remend.training.trainer import Progress, Trainer, train

__all__ = ["PRESETS", "Progress", "Trainer", "TrainingConfig", "train"]
