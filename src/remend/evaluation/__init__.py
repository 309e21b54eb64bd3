"""Measuring what an editor does, in teacher-forced and in freely generated answers."""

from remend.evaluation.ability import Ability
from remend.evaluation.protocols import evaluate, evaluate_checkpoints
from remend.evaluation.report import Report

__all__ = ["Ability", "Report", "evaluate", "evaluate_checkpoints"]
