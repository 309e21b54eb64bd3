"""Evaluation: measure what an editor changes and what it leaves alone, and write a report."""

from remend.evaluation.metrics.lm_eval import LmEvalTasks
from remend.evaluation.protocols import evaluate, evaluate_checkpoints
from remend.evaluation.reports.report import Report

__all__ = ["LmEvalTasks", "Report", "evaluate", "evaluate_checkpoints"]
