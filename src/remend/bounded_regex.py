"""``PatternMatcher``: match names with regular expressions in bounded time, whatever the expression is.

Python's ``re`` tries one way through an expression after the other, and some have more ways than anybody can wait for.
Here all positions that an expression can have reached are advanced together, so that the time is at most the length of
the expression times a power of the name's; and the steps of all matches together are limited too. The package
``regex`` has a time limit, which was tried instead: nested counts exceed it many times, and take all memory.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

MAX_STEPS = 2_000_000
"""The most steps that the matches of one :class:`PatternMatcher` may take together: about a second."""

MAX_DEPTH = 20
"""The deepest nesting of groups in an expression."""

_Positions = frozenset[int]
_Node = Callable[["PatternMatcher", str, _Positions], _Positions]
"""A part of an expression: from the positions where it may begin to those where it may end."""

_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_COUNT = re.compile(r"\{(\d{1,9})(?:(,)(\d{1,9})?)?\}")


class PatternError(ValueError):
    """An expression is malformed, holds what is not understood here, or takes too long to match."""


class PatternMatcher:
    r"""Matches names with regular expressions, and stops when all matches together take too many steps.

    Understood are literal characters, ``.``, classes such as ``[0-9]`` and ``\d``, groups, ``|``, the quantifiers
    ``*``, ``+``, ``?`` and ``{2,3}``, ``^``, ``$``, and lookaheads. Captures, backreferences and flags are not.
    """

    def __init__(self) -> None:
        self._steps = 0

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Return whether a whole name matches an expression.

        Raises:
            PatternError: the expression is malformed, or the matches of this object took too many steps.
        """
        return len(name) in _parse(pattern)(self, name, frozenset([0]))

    def spend(self, steps: int) -> None:
        """Count steps.

        Raises:
            PatternError: there were too many.
        """
        self._steps += steps + 1
        if self._steps > MAX_STEPS:
            raise PatternError(f"takes more than {MAX_STEPS:,} steps to match: write a simpler expression")


@functools.lru_cache(maxsize=4096)
def _parse(pattern: str) -> _Node:
    """Return an expression as a function of positions.

    Raises:
        PatternError: it is malformed, or holds what is not understood here.
    """
    parser = _Parser(pattern)
    node = parser.alternatives(0)
    if parser.rest:
        raise PatternError(f"is no regular expression: there is no '(' for the ')' before {parser.rest[1:]!r}")
    return node


class _Parser:
    """Reads an expression from left to right."""

    def __init__(self, pattern: str) -> None:
        self.rest = pattern

    def _take(self, length: int) -> str:
        taken, self.rest = self.rest[:length], self.rest[length:]
        return taken

    def alternatives(self, depth: int) -> _Node:
        """Read parts that ``|`` separates, up to a closing parenthesis or the end."""
        if depth > MAX_DEPTH:
            raise PatternError(f"nests groups more than {MAX_DEPTH} deep: write a simpler expression")
        choices = [self._sequence(depth)]
        while self.rest.startswith("|"):
            self._take(1)
            choices.append(self._sequence(depth))
        return choices[0] if len(choices) == 1 else _any_of(choices)

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self.rest and self.rest[0] not in "|)":
            parts.append(self._quantified(self._atom(depth)))
        return _one_after_the_other(parts)

    def _quantified(self, node: _Node) -> _Node:
        bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self.rest[:1])
        if bounds is not None:
            self._take(1)
        elif count := _COUNT.match(self.rest):
            self._take(count.end())
            least = int(count[1])
            bounds = (least, least if count[2] is None else int(count[3]) if count[3] else None)
        if bounds is None:
            return node
        if self.rest.startswith("?"):  # "as few as possible" decides what is captured, not whether it matches
            self._take(1)
        if self.rest[:1] in ("*", "+", "?") or _COUNT.match(self.rest):
            raise PatternError(f"is no regular expression: nothing to repeat before {self.rest!r}")
        return _repeated(node, *bounds)

    def _atom(self, depth: int) -> _Node:
        if self.rest[0] == "(":
            return self._group(depth)
        if self.rest[0] in "*+?":
            raise PatternError(f"is no regular expression: nothing to repeat before {self.rest!r}")
        if self.rest[0] in "^$":
            return _anchor(self._take(1) == "^")
        found = _CLASS.match(self.rest) if self.rest[0] == "[" else re.match(r"\\[dwsDWS\W_]|[^\\\[]", self.rest, re.S)
        if found is None or (self.rest[0] == "[" and re.search(r"\[|--|&&|~~|\|\|", found[0][1:])):
            raise PatternError(f"holds {self.rest[:10]!r}, which is not understood in an expression here")
        try:
            return _character(re.compile(self._take(found.end())).fullmatch)
        except re.error as error:
            raise PatternError(f"is no regular expression: {error}") from None

    def _group(self, depth: int) -> _Node:
        start = re.match(r"\((\?[:=!])?", self.rest)
        assert start is not None
        self._take(start.end())
        if self.rest.startswith("?"):
            raise PatternError(f"holds ({self.rest[:5]!r}…, which is not understood in an expression here")
        node = self.alternatives(depth + 1)
        if not self.rest:
            raise PatternError("is no regular expression: a '(' is never closed")
        self._take(1)
        return _lookahead(node, start[1] == "?=") if start[1] in ("?=", "?!") else node


def _character(accepts: Callable[[str], object]) -> _Node:
    def node(matcher: PatternMatcher, name: str, starts: _Positions) -> _Positions:
        matcher.spend(len(starts))
        return frozenset(p + 1 for p in starts if p < len(name) and accepts(name[p]))

    return node


def _anchor(at_start: bool) -> _Node:
    return lambda matcher, name, starts: starts & {0 if at_start else len(name)}


def _one_after_the_other(parts: list[_Node]) -> _Node:
    def node(matcher: PatternMatcher, name: str, starts: _Positions) -> _Positions:
        for part in parts:
            if not starts:
                break
            starts = part(matcher, name, starts)
        return starts

    return node


def _any_of(choices: list[_Node]) -> _Node:
    return lambda matcher, name, starts: frozenset().union(*(choice(matcher, name, starts) for choice in choices))


def _repeated(part: _Node, least: int, most: int | None) -> _Node:
    def node(matcher: PatternMatcher, name: str, starts: _Positions) -> _Positions:
        reached, ends, times = starts, starts if least == 0 else frozenset(), 0
        while reached and (most is None or times < most):
            matcher.spend(len(reached))
            previous, reached = reached, part(matcher, name, reached)
            times += 1
            if reached == previous:  # and so it stays, however often the part is repeated
                return ends | reached
            if times >= least:
                if reached <= ends:
                    break
                ends |= reached
        return ends

    return node


def _lookahead(part: _Node, positive: bool) -> _Node:
    def node(matcher: PatternMatcher, name: str, starts: _Positions) -> _Positions:
        return frozenset(p for p in starts if bool(part(matcher, name, frozenset([p]))) == positive)

    return node
