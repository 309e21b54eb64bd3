"""Push edits and editors to the Hugging Face hub, each with a model card."""

from remend.apps.hub.model_card import render_model_card
from remend.apps.hub.push import push, push_to_hub

__all__ = ["push", "push_to_hub", "render_model_card"]
