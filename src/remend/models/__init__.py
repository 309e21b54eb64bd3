"""Load base models, find their blocks and the matrices to edit, and run them from the lowest edited block on."""

from remend.models.editable_matrices import block_mlp, editable_modules
from remend.models.loading import load_pretrained, skeleton

__all__ = ["block_mlp", "editable_modules", "load_pretrained", "skeleton"]
