"""``hash_task``: whether what was measured of a model in an earlier run holds for this one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

import remend
from remend.fingerprint import hash_model
from remend.tasks.base import Task


def hash_task(task: Task) -> str:
    """Return SHA-256 of all that what is measured of a model that reads text depends on.

    These are its weights in their dtype, its configuration, its tokenizer, how it is run, and the versions of remend
    and torch.

    Raises:
        ModelError: some weights are offloaded; all of them would have to be loaded.
    """
    parts = {
        "model": hash_model(task.model),
        "tokenizer": _describe(task.processor),
        "kind": task.kind,
        "ends": sorted(task.end_tokens),
        "autocast": str(task.autocast),
        "device": task.device.type,
        "remend": remend.__version__,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _describe(tokenizer: Any) -> list[Any]:
    """Return all that decides how a tokenizer makes tokens of a text."""
    if tokenizer.is_fast:  # what stands before is how the last call truncated and padded
        rules = tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2]
    else:
        rules = sorted(tokenizer.get_vocab().items())
    return [type(tokenizer).__name__, rules, tokenizer.all_special_ids, tokenizer.bos_token_id]
