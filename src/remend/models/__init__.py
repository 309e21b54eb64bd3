"""Load base models, find their blocks and the matrices to edit, and run them from the lowest edited block on."""

from remend.models.editable_matrices import editable_modules
from remend.models.loading import load_pretrained, skeleton

__all__ = ["editable_modules", "load_pretrained", "skeleton"]
