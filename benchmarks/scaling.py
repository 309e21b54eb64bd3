"""Time and memory of a training episode against each size of the model and the editor, one size at a time.

    python benchmarks/scaling.py [--config FILE] [--out result.json]

The sizes are episodes a step, the model's width and depth, the number of blocks whose MLPs are edited, and the rank
of the editor networks. Every point is measured in a process of its own: CPU seconds an episode on one thread (medians
over some steps) of a step with new examples (``first``) and of the same step again (``warm``), and the peak memory of
the process.
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

REQUESTS_PER_EPISODE = 4
"""Enough that few locality examples are drawn twice."""


def measure(config: Mapping[str, Any], point: Mapping[str, int]) -> dict[str, Any]:
    """Measure time and memory at one point."""
    torch.set_num_threads(1)
    model = {**config["model"], "n_embd": point["n_embd"], "n_layer": point["n_layer"]}
    size, steps = point["batch_size"], config["warm_up_steps"] + config["steps"]
    trainer = common.random_trainer(
        {**config, "model": {**model, "n_head": point["n_embd"] // config["head_size"]}},
        REQUESTS_PER_EPISODE * size * steps + 4,
        Resources(micro_batch=min(size, config["micro_batch"]), cache=config["cache"]),
        blocks=point["edited_blocks"],
        rank=point["rank"],
        batch_size=size,
    )
    first_seconds, warm_seconds = [], []
    for step in range(steps):
        for seconds in (first_seconds, warm_seconds):
            trainer.step = step
            seconds.append(common.seconds(trainer.train_step) / size)
    return {
        "seconds_per_episode": statistics.median(first_seconds[config["warm_up_steps"] :]),
        "warm_seconds_per_episode": statistics.median(warm_seconds[config["warm_up_steps"] :]),
        "peak_bytes": common.peak_memory(),
        "model_parameters": sum(parameter.numel() for parameter in trainer.task.model.parameters()),
        "editor_parameters": sum(parameter.numel() for parameter in trainer.editor.parameters()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every point once, print and write the result."""
    arguments = common.parser(__doc__, "scaling").parse_args(argv)
    config = common.start(arguments)
    measured: dict[tuple[tuple[str, int], ...], dict[str, Any]] = {}
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for name, values in config["sweeps"].items():
        for value in values:
            point = {**config["centre"], name: value}
            key = tuple(sorted(point.items()))
            if key not in measured:
                measured[key] = common.in_child_process(measure, config, point)
            sweeps.setdefault(name, []).append({name: value, **measured[key]})
            figures = measured[key]
            print(
                f"{name} {value}: {1000 * figures['seconds_per_episode']:.1f} ms an episode, warm "
                f"{1000 * figures['warm_seconds_per_episode']:.1f} ms, {(figures['peak_bytes'] or 0) / 1e9:.2f} GB",
                flush=True,
            )
    common.write(arguments.out, config, {"sweeps": sweeps})


if __name__ == "__main__":
    main()
