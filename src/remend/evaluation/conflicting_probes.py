"""``filter_probes``: leave out locality probes that another edit, applied at the same time, changes on purpose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from remend.request import EditRequest, Probe, Prompt


class SubjectIndex:
    """The subjects of some requests, to be found in prompts as whole words.

    Args:
        requests: the requests; one that names no subject is never found.
    """

    def __init__(self, requests: Iterable[EditRequest]) -> None:
        self._names = {_words(request.subject): request.key for request in requests if request.subject}
        self._names.pop((), None)  # a subject of punctuation has no words, and would be found everywhere
        self._lengths = sorted({len(words) for words in self._names})

    def mentioned_in(self, prompt: Prompt) -> set[str]:
        """Return the subjects (as :attr:`EditRequest.key`) that a prompt mentions."""
        words = _words(str(prompt))
        # Every run of words as long as some subject is looked up: the time does not grow with the number of subjects.
        spans = ((start, length) for length in self._lengths for start in range(len(words) - length + 1))
        names = (self._names.get(words[start : start + length]) for start, length in spans)
        return {name for name in names if name is not None}


def filter_probes(requests: Sequence[EditRequest]) -> tuple[list[EditRequest], int]:
    """Return the requests with the probes that still count while the edits of all of them are applied.

    A locality or near prompt that asks for a fact which one of them edits is left out, since it is meant to change. A
    locality prompt about the subject of another request is no longer far from what is edited, so it counts as near.

    Args:
        requests: the requests whose edits are applied.

    Returns:
        The requests in their order, and how many probes were left out.
    """
    edited = {prompt for request in requests for prompt in request.asking_prompts}
    subjects = SubjectIndex(requests)
    filtered, left_out = [], 0
    for request in requests:
        probes: dict[str, list[Probe]] = {"locality": [], "near": []}
        for kind in probes:
            for probe in getattr(request, kind):
                if probe.prompt in edited:  # whichever phrasing of the fact it is
                    left_out += 1
                else:
                    is_near = kind == "near" or subjects.mentioned_in(probe.prompt) - {request.key}
                    probes["near" if is_near else "locality"].append(probe)
        filtered.append(request.model_copy(update={kind: tuple(listed) for kind, listed in probes.items()}))
    return filtered, left_out


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))
