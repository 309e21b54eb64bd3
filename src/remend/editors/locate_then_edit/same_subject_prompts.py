"""Prompts that name a subject and ask something of it, whatever it is: what an edit of one fact should leave alone."""

from __future__ import annotations

from collections.abc import Sequence

STATEMENTS: Sequence[str] = (
    "{}",
    "{} is known for",
    "{} was born in",
    "{} lives in",
    "{} was founded in",
    "{} is located near",
    "{} belongs to",
    "The name {} comes from",
    "{} works as a",
    "The age of {} is",
    "{} was written by",
    "People like {} because",
    "The history of {} began",
)
"""Beginnings of statements, for a model that completes texts."""

QUESTIONS: Sequence[str] = (
    "What is {} known for?",
    "Where was {} born?",
    "When was {} founded?",
    "What is near {}?",
    "What does {} belong to?",
    "Where does the name {} come from?",
    "What is the profession of {}?",
    "How old is {}?",
    "Who wrote {}?",
    "Why do people like {}?",
    "When did {} begin?",
    "Tell me about {}.",
)
"""Questions, for a model that answers."""
