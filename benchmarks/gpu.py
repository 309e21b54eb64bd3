"""Training speed and memory on a GPU: random models with the shapes of well-known ones, the paper's editor.

    python benchmarks/gpu.py [--config FILE] [--out result.json]

Models are created on the device in bfloat16; nothing is downloaded. Each trains for half a minute on new examples
(``first epoch``), then for as long on the same steps again (``warm``: hidden states and gradient factors come from
the caches). Seconds are wall time with the device synchronized. The table shows episodes a second, the device's peak
memory, and the micro-batch at the end of the run. Without a CUDA device only the configuration's ``smallest`` model
runs, on the CPU, and the table says ``not measured`` for the others.
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
    """Train for some seconds or up to ``last_step``, and return episodes a second and the number of steps."""
    device = trainer.task.device
    trainer.step = first_step
    start, elapsed = clock(device), 0.0
    while trainer.step < last_step and elapsed < seconds:
        trainer.train_step()
        elapsed = clock(device) - start
    steps = trainer.step - first_step
    return steps * trainer.config.batch_size / elapsed, steps


def clock(device: torch.device) -> float:
    """Return wall time after the device has finished its work; on the CPU, CPU seconds of the process."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(config: Mapping[str, Any], shape: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Train one model and return its speed and memory."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dtype = getattr(torch, config["dtype"])
    model = common.random_model(shape["model"], config["seed"], device, dtype)
    resources = Resources(cache=config["cache"], precision=config["precision"])
    warm_up, size = config["warm_up_steps"], config["batch_size"]
    with resources.matmul_precision():
        trainer = common.random_trainer(
            {**config, "model": shape["model"]}, config["requests"], resources, model=model, batch_size=size
        )
        train_for(trainer, float("inf"), 0, warm_up)
        last = config["requests"] // size  # one epoch
        first_rate, steps = train_for(trainer, config["seconds"], warm_up, last)
        warm_rate, _ = train_for(trainer, config["seconds"], warm_up, warm_up + steps)
    return {
        "episodes_per_second": first_rate,
        "warm_episodes_per_second": warm_rate,
        "steps": steps,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else common.peak_memory(),
        "micro_batch": trainer.micro_batch,
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "editor_parameters": sum(p.numel() for p in trainer.editor.parameters()),
    }


def attempt(config: Mapping[str, Any], shape: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return one row of the table: the measurements, or why there are none."""
    row = {"name": shape["name"]}
    if device == "cpu" and not shape.get("smallest"):
        return {**row, "status": "not measured"}
    try:
        return {**row, "status": "measured", "device": device, **measure(config, shape, device)}
    except (ModelError, torch.OutOfMemoryError) as error:  # a larger model does not end the run: the next one may fit
        return {**row, "status": f"does not fit: {str(error).splitlines()[0]}"}
    finally:
        gc.collect()


def results_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table("model", *COLUMNS.values(), title=title)
    for row in rows:
        if row["status"] == "measured":
            values = {**row, "peak_bytes": row["peak_bytes"] / 1e9 if row["peak_bytes"] else float("nan")}
            table.add_row(row["name"], *(f"{values[column]:.3g}" for column in COLUMNS))
        else:
            table.add_row(row["name"], row["status"], *[""] * (len(COLUMNS) - 1))
    return table


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
    Console(width=110).print(results_table(rows, name))


if __name__ == "__main__":
    main()
