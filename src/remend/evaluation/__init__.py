"""Measuring what an editor does, in teacher-forced and in freely generated answers."""

from remend.evaluation.report import Report
from remend.evaluation.single import evaluate

__all__ = ["Report", "evaluate"]
