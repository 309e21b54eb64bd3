"""Write edits as LoRA adapters and merged checkpoints, and make edits of adapters and changed checkpoints."""

from remend.formats.base import EditFormat, ImportedEdit, detect_format
from remend.formats.checkpoint_difference import diff_checkpoints
from remend.formats.merged_checkpoint import save_merged
from remend.formats.peft import save_adapter
from remend.formats.peft_reading import load_adapter

__all__ = [
    "EditFormat",
    "ImportedEdit",
    "detect_format",
    "diff_checkpoints",
    "load_adapter",
    "save_adapter",
    "save_merged",
]
