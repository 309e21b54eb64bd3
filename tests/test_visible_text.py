"""Which characters are shown by their numbers."""

import pytest

from remend.cli.escaping import plain
from remend.visible_text import mark_invisible


@pytest.mark.parametrize(
    "character",
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\u200b\u200c\u200d\u2060\u2061\u2064\ufeff"
    "\u00ad\u034f\u115f\u1160\u3164\uffa0\u180e\u2028\u2029\u206a\ufe00\ufe0f\U000e0041\U000e0100\U000e01ef\u2065\ufff0\ufffb",
)
def test_what_is_invisible_is_marked(character):
    assert mark_invisible(f"a{character}b") == f"a<U+{ord(character):04X}>b"
    assert mark_invisible(character).startswith("<U+")
    if character not in "\u2028\u2029":  # the end of a line is a space
        assert plain(f"a{character}b") == f"a<U+{ord(character):04X}>b"


@pytest.mark.parametrize(
    "text",
    [
        "Ottawa", "Zürich", "東京", "서울", "القاهرة", "می\u200cخواهم", "क्\u200dष", "ශ්\u200dරී",
        "❤\ufe0f", "👩\u200d💻", "👁\ufe0f\u200d🗨", "é e\u0301", "ไทย", "\u0600١٢", "𝔘", "a b\u00a0c",
    ],
)  # fmt: skip
def test_what_writing_needs_stays(text):
    assert mark_invisible(text) == text


def test_joiners_hide_nothing_where_they_join_nothing():
    assert mark_invisible("می\u200c\u200cخ") == "می\u200c<U+200C>خ"
    assert mark_invisible("\u200cخ") == "<U+200C>خ"
