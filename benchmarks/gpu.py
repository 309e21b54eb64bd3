"""Training speed and memory on a GPU: random models with the shapes of well-known ones, the paper's editor.

    python benchmarks/gpu.py [--config FILE] [--out result.json]

Models are made on the device, in bfloat16, and nothing is downloaded. Each trains for half a minute on examples that
are all new (``first epoch``), then for as long on the same steps again (``warm``: hidden states and gradient factors
come from the stores); seconds are wall time with the device synchronised. The table has episodes a second, the peak of
the device's memory, and the micro-batch that the run ended with. Without a CUDA device only the configuration's
``smallest`` model runs, on the CPU, and the table says ``not measured`` for the rest.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import common
from remend.errors import ModelError
from remend.training import Resources, Trainer

COLUMNS = {
    "episodes_per_second": "episodes/s, first epoch",
    "warm_episodes_per_second": "episodes/s, warm",
    "peak_bytes": "peak memory, GB",
    "micro_batch": "micro-batch",
}


def train_for(trainer: Trainer, seconds: float, first_step: int, last_step: int) -> tuple[float, int]:
    """Train from one step until the time is over or another step is reached; returns episodes a second, and steps."""
    device = trainer.task.device
    trainer.step = first_step
    began, spent = clock(device), 0.0
    while trainer.step < last_step and spent < seconds:
        trainer.train_step()
        spent = clock(device) - began
    steps = trainer.step - first_step
    return steps * trainer.config.batch_size / spent, steps


def clock(device: torch.device) -> float:
    """Wall time, after whatever the device had to do; CPU seconds where there is no other device."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(config: Mapping[str, Any], shape: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Train one model."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dtype = getattr(torch, config["dtype"])
    model = common.random_model(shape["model"], config["seed"], device, dtype)
    resources = Resources(cache=config["cache"], precision=config["precision"])
    warm_up, size = config["warm_up_steps"], config["batch_size"]
    with resources.products():
        trainer = common.random_trainer(
            {**config, "model": shape["model"]}, config["requests"], resources, model=model, batch_size=size
        )
        train_for(trainer, float("inf"), 0, warm_up)
        last = config["requests"] // size  # one epoch
        first, steps = train_for(trainer, config["seconds"], warm_up, last)
        warm, _ = train_for(trainer, config["seconds"], warm_up, warm_up + steps)
    return {
        "episodes_per_second": first,
        "warm_episodes_per_second": warm,
        "steps": steps,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else common.peak_memory(),
        "micro_batch": trainer.micro_batch,
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "editor_parameters": sum(p.numel() for p in trainer.editor.parameters()),
    }


def attempt(config: Mapping[str, Any], shape: Mapping[str, Any], device: str) -> dict[str, Any]:
    """One row of the table: what was measured, or why nothing was."""
    row = {"name": shape["name"]}
    if device == "cpu" and not shape.get("smallest"):
        return {**row, "status": "not measured"}
    try:
        return {**row, "status": "measured", "device": device, **measure(config, shape, device)}
    except (ModelError, torch.OutOfMemoryError) as error:  # the next model is worth a try
        return {**row, "status": f"does not fit: {str(error).splitlines()[0]}"}
    finally:
        gc.collect()


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The rows for people."""
    made = Table("model", *COLUMNS.values(), title=title)
    for row in rows:
        if row["status"] == "measured":
            shown = {**row, "peak_bytes": row["peak_bytes"] / 1e9 if row["peak_bytes"] else float("nan")}
            made.add_row(row["name"], *(f"{shown[c]:.3g}" for c in COLUMNS))
        else:
            made.add_row(row["name"], row["status"], *[""] * (len(COLUMNS) - 1))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    arguments = common.parser(__doc__, "gpu").parse_args(argv)
    config = common.start(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for shape in config["shapes"]:
        rows.append(attempt(config, shape, device))
        common.write(arguments.out, config, {"measured": device == "cuda", "results": rows}, device)
    name = torch.cuda.get_device_name() if device == "cuda" else "no CUDA device: the smallest model alone, on the CPU"
    Console(width=110).print(table(rows, name))


if __name__ == "__main__":
    main()
