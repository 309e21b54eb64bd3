"""Edits in the forms of other tools: a LoRA adapter, a merged checkpoint, and the way back from either."""

from remend.formats.checkpoint_difference import Difference, difference
from remend.formats.merged_checkpoint import save_merged
from remend.formats.peft import load_adapter, save_adapter

__all__ = ["Difference", "difference", "load_adapter", "save_adapter", "save_merged"]
