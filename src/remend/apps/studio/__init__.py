"""The studio: a web page on which people ask a model, edit wrong answers and accept the edits, without writing code."""

from remend.apps.studio.prompt_suggestions import SuggestedPrompts, suggest_prompts
from remend.apps.studio.workspace import Session, SessionEdit, Workspace

__all__ = ["Session", "SessionEdit", "SuggestedPrompts", "Workspace", "suggest_prompts"]
