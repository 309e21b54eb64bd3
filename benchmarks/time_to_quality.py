"""The training time until edits are good, of the presets ``default`` and ``paper`` on the built-in atlas.

    python benchmarks/time_to_quality.py [--config FILE] [--out result.json] [--resume] [--quick]

Every line of the configuration is a preset, with changed settings where it names some, and is trained with several
seeds. Times are CPU seconds of the process on one thread; setup and calibration count, validations do not. At each
validation, ``taken`` is the share of held-out edits for which greedy decoding of the prompt or a paraphrase gives the
whole target and the end token, and ``kept`` is the share of unrelated examples at which all first choices are those
of the base model. A run ends after its ``seconds``, or after its preset's steps.

The result is written after every run; ``--resume`` keeps the runs that it has. ``--quick`` (one seed, a few seconds a
run, another file) shows that everything works.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import remend
from remend.editors import Mend
from remend.request import EditRequest
from remend.training import PRESETS, Trainer
from remend.training.episodes import Episodes

VALIDATION_BATCH = 16
QUICK_SECONDS = 45.0


def line_settings(line: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """Return the settings of the network and of training of one line of the configuration."""
    network, settings = PRESETS[line["preset"]]
    return replace(network, **line.get("network", {})), replace(settings, seed=seed, **line.get("training", {}))


def train_run(
    config: Mapping[str, Any],
    line: Mapping[str, Any],
    seed: int,
    data: tuple[Sequence[EditRequest], Sequence[EditRequest]],
) -> dict[str, Any]:
    """Train once, and return the curve: step, CPU seconds and figures of each validation."""
    task = remend.load(config["model"], "cpu")
    network, settings = line_settings(line, seed)
    requests, validation = data
    # Every run validates on the same episodes: each request several times, each time with other paraphrases and
    # locality examples.
    batches_by_draw = [
        Episodes(task, validation, seed=draw).fixed(VALIDATION_BATCH) for draw in range(config["validation_draws"])
    ]
    held_out = [batch for batches in batches_by_draw for batch in batches]
    seconds = -time.process_time()
    editor = Mend.create(task, network, seed=seed)
    trainer = Trainer(task, editor, requests, settings)
    trainer.calibrate()
    seconds += time.process_time()
    calibration_seconds = seconds
    curve = [{"step": 0, "seconds": seconds, **trainer.validate(held_out)}]
    next_validation = line["validate_every"]
    finished = False
    while not finished:
        start = time.process_time()
        trainer.train_step(trainer.step / settings.max_steps)
        seconds += time.process_time() - start
        finished = seconds >= line["seconds"] or trainer.step >= settings.max_steps
        if finished or trainer.step >= next_validation:
            curve.append({"step": trainer.step, "seconds": seconds, **trainer.validate(held_out)})
            print(f"{line['name']}, seed {seed}: {describe(curve[-1])}", flush=True)
            grown = int(trainer.step * line["validate_growth"])
            next_validation = max(trainer.step + line["validate_every"], grown)
    return {"name": line["name"], "seed": seed, "calibration_seconds": calibration_seconds, "curve": curve}


def describe(entry: Mapping[str, float]) -> str:
    """Return a validation as one line of text."""
    return f"step {entry['step']}, {entry['seconds']:.0f} s, taken {entry['taken']:.3f}, kept {entry['kept']:.3f}"


def seconds_to_goal(curve: Sequence[Mapping[str, float]], goal: Mapping[str, float]) -> float | None:
    """Return CPU seconds until the first validation that reaches both shares; None if none does."""
    reached = [entry["seconds"] for entry in curve if all(entry[name] >= share for name, share in goal.items())]
    return reached[0] if reached else None


def summary(runs: Sequence[Mapping[str, Any]], goal: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return for each line when each seed reached the goal, how long it trained, and its last values."""
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        of_line = [run for run in runs if run["name"] == name]
        rows.append(
            {
                "name": name,
                "seeds": [run["seed"] for run in of_line],
                "seconds_to_goal": [seconds_to_goal(run["curve"], goal) for run in of_line],
                "seconds_trained": [run["curve"][-1]["seconds"] for run in of_line],
                "steps": [run["curve"][-1]["step"] for run in of_line],
                "taken": [run["curve"][-1]["taken"] for run in of_line],
                "kept": [run["curve"][-1]["kept"] for run in of_line],
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the runs that the result lacks, and write it after each run."""
    parser = common.parser(__doc__, "time_to_quality")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the result has")
    parser.add_argument("--quick", action="store_true", help="one seed and little time, to see that it works")
    arguments = parser.parse_args(argv)
    config = common.start(arguments)
    if arguments.quick:
        config["seeds"] = config["seeds"][:1]
        config["lines"] = [{**line, "seconds": min(line["seconds"], QUICK_SECONDS)} for line in config["lines"]]
        if arguments.out == parser.get_default("out"):
            arguments.out = Path("runs/time_to_quality-quick.json")
    runs: list[dict[str, Any]] = []
    if arguments.resume and arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        if before["config"] != config:
            raise SystemExit(
                f"{arguments.out} is of another configuration: give another --out, or start without --resume"
            )
        runs = before["runs"]
    data = remend.read_source(config["data"]), remend.read_source(config["validation"])[: config["validation_size"]]
    for seed in config["seeds"]:
        for line in config["lines"]:
            if any(run["name"] == line["name"] and run["seed"] == seed for run in runs):
                continue
            runs.append(train_run(config, line, seed, data))
            common.write(arguments.out, config, {"summary": summary(runs, config["goal"]), "runs": runs})
    print(json.dumps(summary(runs, config["goal"]), indent=2))


if __name__ == "__main__":
    main()
