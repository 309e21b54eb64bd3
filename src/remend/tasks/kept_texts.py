"""What a model writes by itself, and how probable it finds that: measured once, and kept on disk for later runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from remend.disk_cache import load_or_measure
from remend.errors import FileError, ModelError
from remend.saved_folders import read_folder, write_folder
from remend.tasks.base import Example, Task
from remend.tasks.identity import hash_task

TEXTS_FORMAT = "remend.sampled-texts/1"
"""The format in the manifest of kept texts."""

LOG_P_FORMAT = "remend.sampled-texts-log-p/1"
"""That of how probable a model finds its texts."""


def sampled_or_kept(task: Task, seed: int, count: int) -> list[Example]:
    """Return :meth:`Task.ordinary_examples` without a text; of causal models, those of an earlier run where it can.

    Args:
        task: the model.
        seed: of every draw.
        count: how many.

    Raises:
        NonFiniteError: the model's outputs are not finite.
    """

    def sample() -> list[Example]:
        return task.ordinary_examples((), seed, count)

    if not task.causal:  # of others, inputs are drawn and not written, which takes no time
        return sample()
    try:
        depends_on = {"sampled texts": [seed, count], "task": hash_task(task)}
    except ModelError:  # some weights are offloaded, and nothing tells the model from others
        return sample()
    return load_or_measure(depends_on, _load, sample, _save)


def log_p_or_kept(
    task: Task, examples: Sequence[Example], measure: Callable[[], Float[Tensor, " text"]]
) -> Float[Tensor, " text"]:
    """Return log p of each text by the unedited model, float64: what ``measure`` returns, or did in an earlier run.

    Args:
        task: the model.
        examples: the texts, each its first token with the others as targets.
        measure: measures it.
    """

    def load(path: Path) -> Tensor:
        log_p = read_folder(path, LOG_P_FORMAT)[1].get("log_p")
        if log_p is None or log_p.shape != (len(examples),) or not log_p.isfinite().all():
            raise FileError(f"{path}: there is no log p of each of {len(examples)} texts")
        return log_p

    def save(log_p: Tensor, path: Path) -> None:
        write_folder(path, LOG_P_FORMAT, {}, {"log_p": log_p})

    texts = hashlib.sha256(repr([(example.input, example.target) for example in examples]).encode()).hexdigest()
    try:
        depends_on = {"log p of texts": texts, "task": hash_task(task)}
    except ModelError:  # as above
        return measure()
    return load_or_measure(depends_on, load, measure, save)


def _save(examples: Sequence[Example], path: Path) -> None:
    tokens = torch.tensor([token for example in examples for token in example.input])
    lengths = torch.tensor([len(example.input) for example in examples])
    write_folder(path, TEXTS_FORMAT, {}, {"tokens": tokens, "lengths": lengths})


def _load(path: Path) -> list[Example]:
    _, tensors = read_folder(path, TEXTS_FORMAT)
    lengths = tensors["lengths"].tolist()
    if sum(lengths) != len(tensors["tokens"]) or min(lengths) < 1:
        raise FileError(f"{path}: the lengths of the texts are not those of their tokens")
    parts = [tuple(part.tolist()) for part in tensors["tokens"].split(lengths)]
    return [Example(part, part[:1]) for part in parts]
