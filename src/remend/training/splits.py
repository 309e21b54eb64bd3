"""Training and validation requests that share no subject."""

from __future__ import annotations

import random
from collections.abc import Sequence

from remend.errors import TrainingError
from remend.request import EditRequest
from remend.training.config import TrainingConfig

HELD_OUT_SHARE = 0.1
"""The share of subjects kept for validation where no validation file is given."""


def split(
    requests: Sequence[EditRequest], validation: Sequence[EditRequest] | None, config: TrainingConfig
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Training and validation requests that share no subject; validation in an order drawn with the seed."""
    if validation is None:
        subjects = sorted({request.key for request in requests})
        random.Random(f"{config.seed} held out").shuffle(subjects)
        held_out = set(subjects[: max(2, round(len(subjects) * HELD_OUT_SHARE))])
        validation = [request for request in requests if request.key in held_out]
        requests = [request for request in requests if request.key not in held_out]
    shared = sorted({request.key for request in requests} & {request.key for request in validation})
    if shared:
        raise TrainingError(
            f"training and validation share {len(shared)} subjects ({', '.join(shared[:3])} …): what is measured there "
            "would be remembered, not learnt. Move each subject to one side"
        )
    if not requests or not validation:
        raise TrainingError(
            f"{len(requests)} training and {len(validation)} validation requests: at least two subjects are needed on "
            "each side (a file of one request cannot teach an editor)"
        )
    shuffled = list(validation)
    random.Random(f"{config.seed} validation").shuffle(shuffled)
    return list(requests), shuffled
