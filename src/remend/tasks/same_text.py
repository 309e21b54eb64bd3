"""When two texts are the same answer: the one definition that evaluation, acceptance checks and commands share."""

from __future__ import annotations

import re
import unicodedata

FINAL_STOPS = ".。．｡।۔։።"
"""Full stops of several scripts."""

_ARTICLE = re.compile(r"(?:the|The|a|an|An) +(?=\S)")
"""An English article that opens an answer. A capital A is none: "A minor" and "A4" are names."""

_MARKS = ",.;:!?…،؛؟。．，、；：！？｡।۔։።"
_OPENING, _CLOSING = "\"'“”„‘’‚«»‹›「」『』《》〈〉([{（［｛【", "\"'“”„‘’‚«»‹›「」『』《》〈〉)]}）］｝】"
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff])"
)
"""A character of a script that puts no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


def canonical(text: str, ignore_case: bool = False) -> str:
    """Return a text without what no reader counts as a part of an answer.

    Removed are the white space around it, one full stop at its end, and an English article at its beginning; spaces of
    other kinds are plain ones, and letters with marks are composed (NFC). All else carries meaning and stays: "C" is
    not "C#", "5" is not "-5" or "5%", "x2" is not "x²".

    Args:
        text: the text.
        ignore_case: whether upper and lower case are the same.
    """
    composed = unicodedata.normalize("NFC", text)
    plain = "".join(" " if unicodedata.category(c) == "Zs" else c for c in composed).strip()
    if len(plain) > 1 and plain[-1] in FINAL_STOPS and plain[-2] not in FINAL_STOPS:  # an ellipsis is no full stop
        plain = plain[:-1].rstrip()
    plain = _ARTICLE.sub("", plain, count=1) if _ARTICLE.match(plain) else plain
    return unicodedata.normalize("NFC", plain.casefold()) if ignore_case else plain


def joins_words(letter: str) -> bool:
    """Tell whether a character belongs to a word of a script that puts spaces between words."""
    return unicodedata.category(letter or " ")[0] in "LNM" and not _UNSPACED.match(letter)


def same_text(text: str, other: str, ignore_case: bool = False) -> bool:
    """Tell whether two texts are the same answer to a reader (:func:`canonical`)."""
    return canonical(text, ignore_case) == canonical(other, ignore_case)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without quotation marks, brackets and the marks that end sentences.

    Signs within and around a word that belong to it stay: "C#", "-5", "10%", "1/2", ".NET". In scripts without spaces
    between words, every character is a word.
    """
    split = _UNSPACED.sub(r" \1 ", unicodedata.normalize("NFC", text.casefold())).split()
    return [word for part in split if (word := part.lstrip(_OPENING).rstrip(_CLOSING + _MARKS))]
