"""What two sets of requests share: subjects, prompts and facts that one may have taught and the other asks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from remend.data.parsing import alike
from remend.errors import ConfigError, nearest
from remend.request import EditRequest

KINDS = ("subjects", "prompts", "facts")


def shared(one: Sequence[EditRequest], other: Sequence[EditRequest]) -> dict[str, list[str]]:
    """What both sides have, sorted, by kind: nothing of it may be on both sides of a split.

    - ``subjects``: of the requests, or their prompts where they name none;
    - ``prompts``: what is asked for the edited answer, in any phrasing or form. Probes of what must stay do not count:
      they teach no edit, and a neighbour of one side is often edited on the other;
    - ``facts``: such a prompt with the same target.

    Letters' case and the amount of space between words make no difference.
    """
    left, right = _held(one), _held(other)
    return {kind: sorted(left[kind] & right[kind]) for kind in KINDS}


def asked(request: EditRequest) -> set[str]:
    """What a request asks for its target: prompt, paraphrases and other forms, as they are compared."""
    prompts = (request.prompt, *request.paraphrases, *request.unseen_paraphrases, *request.formats)
    return {alike(str(prompt)) for prompt in prompts}


def checked(kinds: Iterable[str]) -> frozenset[str]:
    """The kinds that may be shared, if there are such.

    Raises:
        ConfigError: there is no kind of that name.
    """
    for kind in (allowed := frozenset(kinds)):
        if kind not in KINDS:
            raise ConfigError(f"there is no {kind!r} that both sides could share; {nearest(kind, KINDS)}")
    return allowed


def _held(requests: Iterable[EditRequest]) -> dict[str, set[str]]:
    held: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for request in requests:
        prompts = asked(request)
        held["subjects"].add(request.key)
        held["prompts"] |= prompts
        held["facts"] |= {f"{prompt} → {alike(request.target)}" for prompt in prompts}
    return held
