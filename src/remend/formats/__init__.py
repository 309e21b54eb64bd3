"""Edits in the forms of other tools: a LoRA adapter, a merged checkpoint, and the way back from either."""

from remend.formats.checkpoint_difference import CheckpointDifference, diff_checkpoints
from remend.formats.merged_checkpoint import save_merged
from remend.formats.peft import load_adapter, save_adapter

__all__ = ["CheckpointDifference", "diff_checkpoints", "load_adapter", "save_adapter", "save_merged"]
