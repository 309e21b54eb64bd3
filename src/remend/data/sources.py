"""Naming a set of requests, or a text, on the command line."""

from __future__ import annotations

from pathlib import Path

from remend.assets import ATLAS, CLAIMS, QUESTIONS
from remend.data import atlas, claims, questions
from remend.errors import RequestError
from remend.request import EditRequest, read_requests

_BUILT_IN = {ATLAS: atlas.requests, QUESTIONS: questions.requests, CLAIMS: claims.requests}


def read_source(source: str) -> list[EditRequest]:
    """The requests that ``source`` names: a JSON-lines file, or a split of what ships with remend.

    That is ``atlas:train``, ``atlas:validation`` or ``atlas:test``, and likewise of ``questions`` and ``claims``.

    Raises:
        RequestError: there is no such split or file, or a line of it is malformed.
    """
    kind, colon, split = source.partition(":")
    if kind in _BUILT_IN and colon:
        return list(_BUILT_IN[kind](split))
    return read_requests(source)


def read_text(path: str | Path) -> list[str]:
    """The passages of a plain text file, which blank lines separate.

    Raises:
        RequestError: there is no such file, it is no UTF-8 text, or it holds no words.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as plain UTF-8 text ({error}): name a text file") from None
    passages = [passage for passage in text.split("\n\n") if passage.strip()]
    if not passages:
        raise RequestError(f"{path} holds no text: name a file with ordinary text, as long as you have it")
    return passages
