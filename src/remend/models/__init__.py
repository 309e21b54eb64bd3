"""Loading a base model, and finding in its structure what can be edited."""

from remend.models.loading import load, skeleton
from remend.models.structure import editable_modules

__all__ = ["editable_modules", "load", "skeleton"]
