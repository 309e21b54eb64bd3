"""Measuring what an editor does, in teacher-forced and in freely generated answers."""

from remend.evaluation.metrics.lm_eval import LmEvalTasks
from remend.evaluation.protocols import evaluate, evaluate_checkpoints
from remend.evaluation.reports.report import Report

__all__ = ["LmEvalTasks", "Report", "evaluate", "evaluate_checkpoints"]
