"""Edits and editors on the Hugging Face hub, each with a card that says what it is."""

from remend.apps.hub.model_card import card_of
from remend.apps.hub.push import push, push_to_hub

__all__ = ["card_of", "push", "push_to_hub"]
