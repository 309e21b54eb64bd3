"""Regular expressions in bounded time: they match what Python's do, and none takes for ever."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remend.bounded_regex import PatternError, PatternMatcher

PARTS = st.recursive(
    st.sampled_from(["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", "1", "^", "$"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}", "*?"])).map(
            lambda p: f"({p[0]}){p[1]}"
        ),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
    ),
    max_leaves=6,
)


@given(PARTS, st.text("ab1.", max_size=6))
def test_an_expression_matches_what_pythons_does(pattern, name):
    assert PatternMatcher().fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)


NAMES = ["model.layers.12.mlp.down_proj", "a" * 60 + "c", "." * 200]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "pattern",
    [
        ".*" * 20 + "x", "(a+)+b", "(?:(?:a{1,1000}){1,1000}){1,1000}b", "((((a?){999999}){999999}){999999}){999999}b",
        "(a|a)*b", "(?:.*){999999999}x", "(.*a){12}", r"(\w*)*\d", "(?=(?=(?=.*x).*x).*x).*", "(?:a?){90}b",
    ],
)  # fmt: skip
def test_no_expression_takes_for_ever(pattern, name):
    """Counted in steps, not seconds: each of these is far below the limit."""
    matcher = PatternMatcher()
    assert not matcher.fullmatch(pattern, name)
    assert matcher._steps < 200_000


def test_all_matches_together_are_limited():
    matcher = PatternMatcher()
    with pytest.raises(PatternError, match="steps to match"):
        any(matcher.fullmatch("(.*a.*)*" + str(number), "a" * 300) for number in range(10_000))


@pytest.mark.parametrize(
    "pattern", ["(", ")", "*a", "a**", "[", "(?i)a", r"(a)\1", "a\\", "(" * 5000, "(?P<x>a)", "[b-a]"]
)
def test_what_is_not_understood_is_refused(pattern):
    with pytest.raises(PatternError):
        PatternMatcher().fullmatch(pattern, "a")
