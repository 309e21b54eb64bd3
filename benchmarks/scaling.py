"""How time and memory of a training episode grow with each size, one at a time around a centre.

    python benchmarks/scaling.py [--config FILE] [--out result.json]

Swept are episodes a step, the model's width and depth, the number of blocks whose MLPs are edited, and the rank of the
editor networks. Every point is measured in a process of its own: CPU seconds an episode on one thread, medians over
some steps, of a step of which all examples are new (``first``) and of the same step again (``warm``); and the peak
memory of the process.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import common
from remend.training import Resources

SPREAD = 4
"""Requests for each episode that is run, so that few locality examples are drawn twice."""


def measure(config: Mapping[str, Any], point: Mapping[str, int]) -> dict[str, Any]:
    """Time and memory at one point."""
    torch.set_num_threads(1)
    model = {**config["model"], "n_embd": point["n_embd"], "n_layer": point["n_layer"]}
    size, steps = point["batch_size"], config["warm_up_steps"] + config["steps"]
    trainer = common.random_trainer(
        {**config, "model": {**model, "n_head": point["n_embd"] // config["head_size"]}},
        SPREAD * size * steps + 4,
        Resources(micro_batch=min(size, config["micro_batch"]), cache=config["cache"]),
        blocks=point["edited_blocks"],
        rank=point["rank"],
        batch_size=size,
    )
    first, warm = [], []
    for step in range(steps):
        for taken in (first, warm):
            trainer.step = step
            taken.append(common.seconds(trainer.train_step) / size)
    return {
        "seconds_per_episode": statistics.median(first[config["warm_up_steps"] :]),
        "warm_seconds_per_episode": statistics.median(warm[config["warm_up_steps"] :]),
        "peak_bytes": common.peak_memory(),
        "model_parameters": sum(p.numel() for p in trainer.task.model.parameters()),
        "editor_parameters": sum(p.numel() for p in trainer.editor.parameters()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every point once, print and write the result."""
    arguments = common.parser(__doc__, "scaling").parse_args(argv)
    config = common.start(arguments)
    known: dict[tuple[tuple[str, int], ...], dict[str, Any]] = {}
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for name, values in config["sweeps"].items():
        for value in values:
            point = {**config["centre"], name: value}
            key = tuple(sorted(point.items()))
            if key not in known:
                known[key] = common.in_a_child(measure, config, point)
            sweeps.setdefault(name, []).append({name: value, **known[key]})
            found = known[key]
            print(
                f"{name} {value}: {1000 * found['seconds_per_episode']:.1f} ms an episode, warm "
                f"{1000 * found['warm_seconds_per_episode']:.1f} ms, {(found['peak_bytes'] or 0) / 1e9:.2f} GB",
                flush=True,
            )
    common.write(arguments.out, config, {"sweeps": sweeps})


if __name__ == "__main__":
    main()
