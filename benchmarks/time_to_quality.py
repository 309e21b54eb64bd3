"""How much time training takes until edits are good: the preset ``default``, and the paper's, on the built-in atlas.

    python benchmarks/time_to_quality.py [--config FILE] [--out result.json] [--resume] [--quick]

Every line of the configuration is a preset, with some settings changed perhaps, trained with several seeds through the
same engine. CPU seconds of the process on one thread; setting up and calibration count, the validations do not. At
each validation ``taken`` is the share of held-out edits whose neighbour (the prompt or a paraphrase) is answered by
greedy decoding with the whole target and the end token, ``kept`` the share of unrelated examples at which the edited
model's first choices are all still the base model's. A run ends after its ``seconds``, or after its preset's steps.

The result is written after every run; ``--resume`` keeps the runs that it has already. ``--quick`` (one seed, a few
seconds a run, another file) shows that everything works.
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


def settings_of(line: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """The network's and the training's settings of one line of the configuration."""
    network, settings = PRESETS[line["preset"]]
    return replace(network, **line.get("network", {})), replace(settings, seed=seed, **line.get("training", {}))


def run(
    config: Mapping[str, Any],
    line: Mapping[str, Any],
    seed: int,
    data: tuple[Sequence[EditRequest], Sequence[EditRequest]],
) -> dict[str, Any]:
    """Train once; returns the curve: step, CPU seconds and what was measured, at each validation."""
    task = remend.load(config["model"], "cpu")
    network, settings = settings_of(line, seed)
    requests, validation = data
    # The same for every run: each request as often as configured, with other draws of neighbour and locality example.
    drawn = [
        Episodes(task, validation, seed=draw).fixed(VALIDATION_BATCH) for draw in range(config["validation_draws"])
    ]
    held_out = [batch for batches in drawn for batch in batches]
    spent = -time.process_time()
    editor = Mend.create(task, network, seed=seed)
    trainer = Trainer(task, editor, requests, settings)
    trainer.calibrate()
    spent += time.process_time()
    calibration = spent
    curve = [{"step": 0, "seconds": spent, **trainer.validate(held_out)}]
    due = line["validate_every"]
    over = False
    while not over:
        began = time.process_time()
        trainer.train_step(trainer.step / settings.max_steps)
        spent += time.process_time() - began
        over = spent >= line["seconds"] or trainer.step >= settings.max_steps
        if over or trainer.step >= due:
            curve.append({"step": trainer.step, "seconds": spent, **trainer.validate(held_out)})
            print(f"{line['name']}, seed {seed}: {shown(curve[-1])}", flush=True)
            due = max(trainer.step + line["validate_every"], int(trainer.step * line["validate_growth"]))
    return {"name": line["name"], "seed": seed, "calibration_seconds": calibration, "curve": curve}


def shown(entry: Mapping[str, float]) -> str:
    """A validation in a few words."""
    return f"step {entry['step']}, {entry['seconds']:.0f} s, taken {entry['taken']:.3f}, kept {entry['kept']:.3f}"


def reached(curve: Sequence[Mapping[str, float]], goal: Mapping[str, float]) -> float | None:
    """CPU seconds until the first validation at which both shares were reached; ``None`` if none was."""
    good = [entry["seconds"] for entry in curve if all(entry[name] >= share for name, share in goal.items())]
    return good[0] if good else None


def summary(runs: Sequence[Mapping[str, Any]], goal: Mapping[str, float]) -> list[dict[str, Any]]:
    """For each line: when each seed reached the goal, how long those trained that did not, and their last values."""
    found = []
    for name in dict.fromkeys(one["name"] for one in runs):
        own = [one for one in runs if one["name"] == name]
        found.append(
            {
                "name": name,
                "seeds": [one["seed"] for one in own],
                "seconds_to_goal": [reached(one["curve"], goal) for one in own],
                "seconds_trained": [one["curve"][-1]["seconds"] for one in own],
                "steps": [one["curve"][-1]["step"] for one in own],
                "taken": [one["curve"][-1]["taken"] for one in own],
                "kept": [one["curve"][-1]["kept"] for one in own],
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the result does not have yet, and write it after each run."""
    parser = common.parser(__doc__, "time_to_quality")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the result has already")
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
            raise SystemExit(f"{arguments.out} is of another configuration: give another --out, or begin anew")
        runs = before["runs"]
    data = remend.read_source(config["data"]), remend.read_source(config["validation"])[: config["validation_size"]]
    for seed in config["seeds"]:
        for line in config["lines"]:
            if any(one["name"] == line["name"] and one["seed"] == seed for one in runs):
                continue
            runs.append(run(config, line, seed, data))
            common.write(arguments.out, config, {"summary": summary(runs, config["goal"]), "runs": runs})
    print(json.dumps(summary(runs, config["goal"]), indent=2))


if __name__ == "__main__":
    main()
