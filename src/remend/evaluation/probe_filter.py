"""What must stay when several edits are at work at once: a prompt that one edit leaves alone, another may be about."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from remend.request import EditRequest, Probe, Prompt


class Subjects:
    """What some requests are about, found in prompts as whole words.

    Args:
        requests: those whose subjects are looked for; one that names none is found nowhere.
    """

    def __init__(self, requests: Iterable[EditRequest]) -> None:
        self._names = {_words(request.subject): request.key for request in requests if request.subject}
        self._names.pop((), None)
        self._lengths = sorted({len(words) for words in self._names})

    def of(self, prompt: Prompt) -> set[str]:
        """The subjects (as :attr:`EditRequest.key`) that a prompt mentions."""
        words = _words(str(prompt))
        places = ((start, length) for length in self._lengths for start in range(len(words) - length + 1))
        found = (self._names.get(words[start : start + length]) for start, length in places)
        return {name for name in found if name is not None}


def in_company(requests: Sequence[EditRequest]) -> tuple[list[EditRequest], int]:
    """The requests with the probes that are still theirs while the edits of all of them are at work.

    A locality or near prompt that asks for a fact which one of them edits is left out: it is meant to change. A
    locality prompt about the subject of another one is no longer far from what was edited, but near.

    Args:
        requests: whose edits are at work.

    Returns:
        The requests in their order, and how many probes were left out.
    """
    edited = {p for r in requests for p in (r.prompt, *r.paraphrases, *r.unseen_paraphrases, *r.formats)}
    subjects = Subjects(requests)
    found, left_out = [], 0
    for request in requests:
        kept: dict[str, list[Probe]] = {"locality": [], "near": []}
        for kind in kept:
            for probe in getattr(request, kind):
                if probe.prompt in edited:
                    left_out += 1
                else:
                    close = kind == "near" or subjects.of(probe.prompt) - {request.key}
                    kept["near" if close else "locality"].append(probe)
        found.append(request.model_copy(update={kind: tuple(probes) for kind, probes in kept.items()}))
    return found, left_out


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))
