"""When an answer that does not end is right: the one definition that evaluation, acceptance checks and commands share.

A model that goes on writing after any answer says an expected one if its text begins with it and does not go on with
the same word. What counts of the model's own answer is its first word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from remend.tasks.same_text import FINAL_STOPS, canonical, joins_words

MOST_SPAN_TOKENS = 8
"""The most tokens of a model's own answer that count: longer words are rare, and what follows is no answer.

Measured on SmolLM2: what a model writes freely after its first word changes under any harmless perturbation (of five
tokens, some in most texts), while the first word is what it answers.
"""

_ARTICLE = re.compile(r"(?:the|a|an)", re.IGNORECASE)
_WORD_SIGNS = "#%‰°+"
"""Signs that belong to the word before them: "C" is not "C#", "5" is not "5%"."""
_LINKING = ".,:'’-‐‑/@&_·"
"""Marks that are a part of a word where a letter or digit follows at once: 3.14, Levi's, Baden-Baden, .NET, AT&T."""


def goes_on_with_word(text: str, following: str) -> bool:
    """Tell whether what follows a text goes on with its last word.

    It does where a letter or a digit follows at once (``Rome`` + ``o``, ``Apple`` + ``s``), a sign of the word (``5`` +
    ``%``), or a mark between two parts of a word (``3`` + ``.14``, ``Levi`` + ``'s``, ``Baden`` + ``-Baden``). It does
    not after a space, a line break, or a mark that ends a word or a sentence. Scripts without spaces between words show
    no boundary, so that anything may follow there.
    """
    if not text or not following:
        return False
    last, first, second = text[-1], following[0], following[1:2]
    if first in _WORD_SIGNS:
        return True
    if unicodedata.category(first)[0] == "M":  # it is put on the letter before it
        return True
    if not joins_words(last):
        return False
    return joins_words(first) or (first in _LINKING and bool(second) and joins_words(second))


def may_go_on_with_word(text: str, following: str) -> bool:
    """Tell whether what follows a text goes on with its last word, or could once more is known of it.

    A hyphen or an apostrophe alone could (``plant`` + ``-``); a full stop, a comma or a colon only after a digit.
    """
    alone = len(following) == 1 and following in _LINKING and (following not in ".,:" or text[-1:].isdigit())
    return alone or goes_on_with_word(text, following)


def begins_with(answer: str, expected: str) -> bool:
    """Tell whether an answer begins with the expected one at a word boundary.

    Spaces around both, an English article at the beginning and a full stop at the end do not matter, as in
    :func:`remend.tasks.same_text.same_text`. An empty text is no answer.
    """
    wanted, given = canonical(expected), canonical(answer)
    if not wanted or not given.startswith(wanted):
        return False
    return not goes_on_with_word(wanted, given[len(wanted) :])


def first_word_length(count: int, decode: Callable[[int], str]) -> int:
    """Return the number of tokens of an answer up to the end of its first word: those that count of one without an end.

    An article and marks are no word. At most :data:`MOST_SPAN_TOKENS`.

    Args:
        count: the number of tokens.
        decode: returns the text of the first tokens.
    """
    most = min(count, MOST_SPAN_TOKENS)
    for length in range(1, most):
        text = decode(length).strip()
        following = decode(min(length + 2, count)).lstrip()  # a mark joins two parts of a word, or ends it
        if not following.startswith(text):  # the token holds a part of a character
            continue
        word = text.rstrip(FINAL_STOPS + _LINKING)
        if not any(map(str.isalnum, word)) or _ARTICLE.fullmatch(word):
            continue
        if not goes_on_with_word(word, following[len(word) :]):
            return length
    return most
