"""The best learning rates and loss weights of KE and ENN: each is trained briefly and evaluated on validation requests.

    python benchmarks/tune_baselines.py

A comparison is fair only if the baselines are tuned, too. ``paper.methods`` takes the settings with the largest sum
of edit success, far and near locality over the testbeds. This takes about twenty minutes on one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import common
import remend
from paper.methods import METHODS
from paper.testbeds import make_testbeds
from remend.editors import trainable_class
from remend.evaluation.reports.report import metrics_of

METRICS = ("edit_success", "locality_far", "locality_near")


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate every combination, and write the result as JSON and as a Markdown table."""
    arguments = common.parser(__doc__, "tune_baselines").parse_args(argv)
    config = common.start(arguments)
    rows = []
    for name in config["testbeds"]:
        source = make_testbeds()[name].source
        testbed = (
            remend.load(source, "cpu"),
            remend.read_source(f"{source}:train"),
            remend.read_source(f"{source}:validation"),
        )
        for method, rate, weight in itertools.product(config["methods"], config["rates"], config["edit_weights"]):
            figures = measure(testbed, method, rate, weight, config)
            rows.append({"testbed": name, "method": method, "rate": rate, "edit_weight": weight, **figures})
            print(rows[-1], flush=True)
    common.write(arguments.out, config, {"rows": rows})
    arguments.out.with_suffix(".md").write_text(table(rows, config), encoding="utf-8")


def measure(testbed: Any, name: str, rate: float, weight: float, config: dict[str, Any]) -> dict[str, float]:
    """Train an editor with these settings, and return success and localities of single edits."""
    task, train, validation = testbed
    method, steps = METHODS[name], config["steps"]
    assert method.training is not None
    settings = replace(
        method.training, learning_rate=rate, edit_weight=weight, max_steps=steps, patience=steps, validate_every=steps,
        validation_size=min(64, len(validation)), seed=config["seed"],
    )  # fmt: skip
    editor = trainable_class(method.editor).create(task, method.config, seed=config["seed"])
    editor = remend.train(task, train, validation, config=settings, editor=editor)
    # The text is part of the seed: with another one, other requests would be drawn.
    requests = random.Random(f"rivals {config['seed']}").sample(validation, config["requests"])
    report = remend.evaluate(task, editor, requests, baselines=False)
    figures = metrics_of(report.runs[0].cases)
    return {metric: figures[metric]["generated"].mean for metric in METRICS}


def table(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> str:
    """Return the figures of each setting on each testbed, and their sum, as Markdown."""
    lines = [
        f"Success / far / near of {config['requests']} validation requests after {config['steps']} steps "
        "(`python benchmarks/tune_baselines.py`).",
        "",
        f"| method | learning rate | c_e | {' | '.join(config['testbeds'])} | sum |",
        f"|---|---|---|{'---|' * len(config['testbeds'])}---|",
    ]
    for setting in itertools.product(config["methods"], config["rates"], config["edit_weights"]):
        matching = [row for row in rows if (row["method"], row["rate"], row["edit_weight"]) == setting]
        cells = [" / ".join(f"{row[metric]:.3f}" for metric in METRICS) for row in matching]
        total = sum(row[metric] for row in matching for metric in METRICS)
        lines.append(f"| {setting[0]} | {setting[1]:g} | {setting[2]:g} | {' | '.join(cells)} | {total:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
