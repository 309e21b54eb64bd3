"""Edits and editors on the Hugging Face hub, each with a card that says what it is."""

from remend.hub.card import card_of
from remend.hub.pushing import Publishable, push

__all__ = ["Publishable", "card_of", "push"]
