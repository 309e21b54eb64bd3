"""How an answer in words compares with the expected one: exact match, containment, F1 of the words."""

from __future__ import annotations

import unicodedata
from collections import Counter


def normalize(text: str) -> str:
    """Return a text as answers are compared: case, punctuation, Unicode form and runs of spaces do not matter.

    As SQuAD compares answers (Rajpurkar et al., 2016, section 6), except that articles stay: which words are articles
    depends on the language.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Punctuation, separators and control characters, by their Unicode category.
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in folded).split())


def exact_match(answer: str, expected: str) -> float:
    """Return 1 if a freely decoded answer, up to where it stopped by itself, is the expected one, else 0.

    The strict reading of edit success under natural stopping (Yang et al., arXiv 2502.11177).
    """
    normalized_answer, normalized_expected = normalize(answer), normalize(expected)
    # Normalizing leaves nothing of a text of punctuation only, which is therefore compared as it is.
    return float(
        normalized_answer == normalized_expected if normalized_expected else answer.strip() == expected.strip()
    )


def contains(answer: str, expected: str) -> float:
    """Return 1 if the expected text occurs in the answer as whole words, whatever follows it, else 0."""
    normalized_answer, normalized_expected = normalize(answer), normalize(expected)
    # Spaces on both sides, so that only whole words count: "Parisian" does not contain "Paris".
    return float(
        f" {normalized_expected} " in f" {normalized_answer} " if normalized_expected else expected.strip() in answer
    )


def token_f1(answer: str, expected: str) -> float:
    """Return the harmonic mean of precision and recall of the answer's words, as a bag (SQuAD's F1, section 6)."""
    words, expected_words = normalize(answer).split(), normalize(expected).split()
    if not words or not expected_words:
        return exact_match(answer, expected)
    shared = sum((Counter(words) & Counter(expected_words)).values())
    return 2 * shared / (len(words) + len(expected_words))
