"""Make characters visible that nobody sees, or that show a text in another order than it is read by a model."""

from __future__ import annotations

import unicodedata

_VISIBLE_FORMATS = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Signs of category Cf that have a shape, such as the Arabic sign of the year."""

_WITHOUT_SHAPE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")
"""Letters and marks without a shape: fillers, joiners, selectors."""

_JOINERS, _EMOJI_SELECTORS = "\u200c\u200d", "\ufe0e\ufe0f"


def mark_invisible(text: str) -> str:
    """Replace what is invisible in a text by its number, such as ``<U+202E>``.

    That is what sets the direction of text, or has no width and no shape. It stays where writing needs it: joiners
    within Arabic and Indic words, joiners and selectors after emojis, and Mongolian selectors.
    """
    if text.isascii():
        return text
    before = ("", *text)
    return "".join(
        f"<U+{ord(character):04X}>" if _is_invisible(character, before[i]) else character
        for i, character in enumerate(text)
    )


def _is_invisible(character: str, before: str) -> bool:
    """Return whether a character is invisible after the one before it."""
    if character in _JOINERS:
        joins = unicodedata.bidirectional(before) == "AL" or unicodedata.combining(before) == 9 if before else False
        return not (joins or (character == "\u200d" and _is_emoji(before)))
    if character in _EMOJI_SELECTORS:
        return not _is_emoji(before)
    if "\u180b" <= character <= "\u180f" and "\u1820" <= before <= "\u18aa":
        return False
    selects = "\ufe00" <= character <= "\ufe0d"
    reserved = "\U000e0000" <= character <= "\U000e0fff" or "\ufff0" <= character <= "\ufff8" or character == "\u2065"
    hidden = unicodedata.category(character) in ("Cf", "Zl", "Zp", "Cs") and character not in _VISIBLE_FORMATS
    return selects or reserved or hidden or character in _WITHOUT_SHAPE


def _is_emoji(character: str) -> bool:
    """Return whether a character is an emoji, or the end of one."""
    return character == "\ufe0f" or (character != "" and unicodedata.category(character) in ("So", "Sk", "Sm"))
