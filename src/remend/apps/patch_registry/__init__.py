"""The patch book: a folder that records every edit of a deployed model, and which of them act."""

from remend.apps.patch_registry.conflicts import Conflict, ConflictError
from remend.apps.patch_registry.database import Entry, Event
from remend.apps.patch_registry.registry import PatchRegistry

__all__ = ["Conflict", "ConflictError", "Entry", "Event", "PatchRegistry"]
