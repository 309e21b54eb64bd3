"""``sampled_or_kept``: what a model writes by itself, which is sampled once and kept on disk for later runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from remend.disk_cache import load_or_measure
from remend.errors import FileError, ModelError
from remend.saved_folders import read_folder, write_folder
from remend.tasks.base import Example, Task
from remend.tasks.identity import hash_task

TEXTS_FORMAT = "remend.sampled-texts/1"
"""The format in the manifest of kept texts."""


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
