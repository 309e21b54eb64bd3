"""Contamination between two sets of requests: the subjects, prompts and facts that are in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from remend.data.parsing import normalize
from remend.errors import ConfigError, nearest
from remend.request import EditRequest

OVERLAP_KINDS = ("subjects", "prompts", "facts")


def find_overlap(first: Sequence[EditRequest], second: Sequence[EditRequest]) -> dict[str, list[str]]:
    """Return what both sets of requests have in common, sorted, by kind; two sides of a split should share nothing.

    - ``subjects``: of the requests, or their prompts where they name none;
    - ``prompts``: the prompts for the edited answer, in any phrasing or form. Probes of what must stay do not count:
      they teach no edit, and a neighbor of one side is often edited on the other;
    - ``facts``: such a prompt with the same target.

    Case and the number of spaces between words make no difference.
    """
    left, right = _keys(first), _keys(second)
    return {kind: sorted(left[kind] & right[kind]) for kind in OVERLAP_KINDS}


def edited_prompts(request: EditRequest) -> set[str]:
    """Return the normalized prompts for a request's target: its prompt, paraphrases and other forms."""
    # With the unseen paraphrases: what was trained on may be what the other side keeps for evaluation.
    return {normalize(str(prompt)) for prompt in request.asking_prompts}


def check_overlap_kinds(kinds: Iterable[str]) -> frozenset[str]:
    """Return the kinds as a set.

    Raises:
        ConfigError: there is no kind of that name.
    """
    for kind in (allowed := frozenset(kinds)):
        if kind not in OVERLAP_KINDS:
            raise ConfigError(f"there is no {kind!r} that both sides could share; {nearest(kind, OVERLAP_KINDS)}")
    return allowed


def _keys(requests: Iterable[EditRequest]) -> dict[str, set[str]]:
    keys: dict[str, set[str]] = {kind: set() for kind in OVERLAP_KINDS}
    for request in requests:
        prompts = edited_prompts(request)
        keys["subjects"].add(request.key)
        keys["prompts"] |= prompts
        keys["facts"] |= {f"{prompt} → {normalize(request.target)}" for prompt in prompts}
    return keys
