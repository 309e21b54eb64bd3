"""How much of an expected answer is in an answer in words: containment, F1 of the words.

Whether both are the same answer is told by :meth:`remend.tasks.Task.same_answer`. These two measures are less strict:
they look at the words in any letter case.
"""

from __future__ import annotations

from collections import Counter

from remend.tasks.same_text import canonical, same_text, words


def contains(answer: str, expected: str) -> float:
    """Return 1 if the expected text occurs in the answer as whole words, whatever follows it, else 0.

    An empty one never does.
    """
    given, looked_for = words(answer), words(canonical(expected))
    if not looked_for:  # a text of punctuation only has no words
        return float(bool(expected.strip()) and expected.strip() in answer)
    starts = range(len(given) - len(looked_for) + 1)
    return float(any(given[start : start + len(looked_for)] == looked_for for start in starts))


def token_f1(answer: str, expected: str) -> float:
    """Return the harmonic mean of precision and recall of the answer's words, as a bag (SQuAD's F1, section 6)."""
    if answer.strip() and same_text(answer, expected, ignore_case=True):
        return 1.0
    given, looked_for = words(answer), words(expected)
    if not given or not looked_for:
        return 0.0
    shared = sum((Counter(given) & Counter(looked_for)).values())
    return 2 * shared / (len(given) + len(looked_for))
