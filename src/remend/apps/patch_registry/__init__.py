"""The patch registry: a folder that records every edit of a deployed model, and which edits are active."""

from remend.apps.patch_registry.conflicts import Conflict, ConflictError
from remend.apps.patch_registry.database import PatchEntry, PatchEvent
from remend.apps.patch_registry.registry import Fault, PatchRegistry

__all__ = ["Conflict", "ConflictError", "Fault", "PatchEntry", "PatchEvent", "PatchRegistry"]
