"""Training an editor: the outer loop of the paper's algorithm 1."""

from remend.training.config import PRESETS, Resources, TrainingConfig
from remend.training.loop import TrainingProgress, train
from remend.training.trainer import Trainer

__all__ = ["PRESETS", "Resources", "Trainer", "TrainingConfig", "TrainingProgress", "train"]
