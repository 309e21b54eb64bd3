"""Splits requests into training and validation requests that share no subject, prompt or fact."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

from remend.data.contamination import check_overlap_kinds, edited_prompts, find_overlap
from remend.errors import TrainingError
from remend.request import EditRequest
from remend.training.config import TrainingConfig

HELD_OUT_SHARE = 0.1
"""The share of subjects that are held out for validation where no validation requests are given."""


def split(
    requests: Sequence[EditRequest],
    validation: Sequence[EditRequest] | None,
    config: TrainingConfig,
    allow_shared: Iterable[str] = (),
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Return training and validation requests that share nothing; validation in an order drawn with the seed.

    Where no validation requests are given, some subjects are held out, together with all subjects that share a prompt
    with one of them.

    Raises:
        TrainingError: both sides share subjects, prompts or facts (unless named in ``allow_shared``), or one is empty.
        ConfigError: ``allow_shared`` names something else.
    """
    allowed = check_overlap_kinds(allow_shared)
    if validation is None:
        group = _groups(requests, by_prompt="prompts" not in allowed)
        names = sorted(set(group.values()))
        random.Random(f"{config.seed} held out").shuffle(names)
        held_out = set(names[: max(2, round(len(names) * HELD_OUT_SHARE))])
        validation = [request for request in requests if group[request.key] in held_out]
        requests = [request for request in requests if group[request.key] not in held_out]
    _check(requests, validation, allowed)
    if not requests or not validation:
        raise TrainingError(
            f"{len(requests)} training and {len(validation)} validation requests: at least two subjects are needed on "
            "each side, with different prompts (a file of one request cannot teach an editor)"
        )
    shuffled = list(validation)
    random.Random(f"{config.seed} validation").shuffle(shuffled)
    return list(requests), shuffled


def _check(requests: Sequence[EditRequest], validation: Sequence[EditRequest], allowed: frozenset[str]) -> None:
    for kind, shared in find_overlap(requests, validation).items():
        if shared and kind not in allowed:
            examples = ", ".join(text if len(text) <= 60 else f"{text[:59]}…" for text in shared[:3])
            raise TrainingError(
                f"training and validation share {len(shared)} {kind} ({examples}{' …' if len(shared) > 3 else ''}): "
                "validation would measure what the editor remembers, not what it learned. Move each to one side, or "
                f"allow it: allow_shared=[{kind!r}] (--allow-shared {kind})"
            )


def _groups(requests: Sequence[EditRequest], by_prompt: bool) -> dict[str, str]:
    """Return for each subject the first subject of its group: those connected by a common prompt.

    Args:
        requests: the requests.
        by_prompt: whether common prompts connect subjects; otherwise each is alone.
    """
    # A union-find structure: each subject points towards the first of its group.
    leader = {request.key: request.key for request in requests}

    def find(key: str) -> str:
        while leader[key] != key:
            leader[key] = key = leader[leader[key]]
        return key

    subjects_of_prompt: dict[str, list[str]] = defaultdict(list)
    for request in requests if by_prompt else ():
        for prompt in edited_prompts(request):
            subjects_of_prompt[prompt].append(request.key)
    for keys in subjects_of_prompt.values():
        for key in keys[1:]:
            low, high = sorted((find(keys[0]), find(key)))
            leader[high] = low
    return {key: find(key) for key in leader}
