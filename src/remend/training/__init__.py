"""Training of editors: the outer loop of the paper's algorithm 1, for any :class:`remend.editors.TrainableEditor`.

* A run: ``loop`` (:func:`train`), ``training_run``, ``checkpoint``, ``interrupts``, ``tracking``.
* A step: ``trainer``, ``episode_runner``, ``optimizer``.
* Data: ``splits``, ``episodes``, ``negative_mining``; ``activation_cache``, ``tensor_store`` (what is computed once).
* Settings and resources: ``config``, ``memory``, ``resource_estimate``, ``preflight``.
"""

from remend.training.config import PRESETS, Resources, TrainingConfig
from remend.training.loop import TrainingProgress, train
from remend.training.trainer import Trainer

__all__ = ["PRESETS", "Resources", "Trainer", "TrainingConfig", "TrainingProgress", "train"]
