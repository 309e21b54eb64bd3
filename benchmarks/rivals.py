"""With which settings KE and ENN do best: each is trained briefly with several, and judged on validation requests.

    python benchmarks/rivals.py

A comparison is worth as much as the care that its rivals were given. ``paper.methods`` takes for each the
settings with the largest sum of edit success, far and near locality over the worlds. It takes about twenty minutes on
one thread.
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
from remend.editors import TRAINED
from remend.evaluation.reports.report import metrics_of
from remend.tasks import wrap

SHOWN = ("edit_success", "locality_far", "locality_near")


def main(argv: Sequence[str] | None = None) -> None:
    """Train and judge every combination, and write what was found as JSON and as a table beside it."""
    arguments = common.parser(__doc__, "rivals").parse_args(argv)
    config = common.start(arguments)
    rows = []
    for name in config["worlds"]:
        source = make_testbeds()[name].source
        world = (
            remend.load(source, "cpu"),
            remend.read_source(f"{source}:train"),
            remend.read_source(f"{source}:validation"),
        )
        for method, rate, weight in itertools.product(config["methods"], config["rates"], config["edit_weights"]):
            found = measure(world, method, rate, weight, config)
            rows.append({"world": name, "method": method, "rate": rate, "edit_weight": weight, **found})
            print(rows[-1], flush=True)
    common.write(arguments.out, config, {"rows": rows})
    arguments.out.with_suffix(".md").write_text(table(rows, config), encoding="utf-8")


def measure(world: Any, method: str, rate: float, weight: float, config: dict[str, Any]) -> dict[str, float]:
    """Success and localities of single edits of an editor that was trained with these settings."""
    (model, tokenizer), train, validation = world
    own, steps = METHODS[method], config["steps"]
    assert own.training is not None
    settings = replace(
        own.training, learning_rate=rate, edit_weight=weight, max_steps=steps, patience=steps, validate_every=steps,
        validation_size=min(64, len(validation)), seed=config["seed"],
    )  # fmt: skip
    editor = TRAINED[own.editor].create(wrap(model, tokenizer), own.config, seed=config["seed"])
    editor = remend.train(wrap(model, tokenizer), train, validation, config=settings, editor=editor)
    chosen = random.Random(f"rivals {config['seed']}").sample(validation, config["requests"])
    report = remend.evaluate(wrap(model, tokenizer), editor, chosen, baselines=False)
    figures = metrics_of(report.runs[0].cases)
    return {metric: figures[metric]["generated"].mean for metric in SHOWN}


def table(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> str:
    """The figures as markdown: of each setting, in each world and their sum over all worlds."""
    lines = [
        f"Success / far / near of {config['requests']} validation requests after {config['steps']} steps "
        "(`python benchmarks/rivals.py`).",
        "",
        f"| method | learning rate | c_e | {' | '.join(config['worlds'])} | sum |",
        f"|---|---|---|{'---|' * len(config['worlds'])}---|",
    ]
    for setting in itertools.product(config["methods"], config["rates"], config["edit_weights"]):
        own = [row for row in rows if (row["method"], row["rate"], row["edit_weight"]) == setting]
        cells = [" / ".join(f"{row[metric]:.3f}" for metric in SHOWN) for row in own]
        total = sum(row[metric] for row in own for metric in SHOWN)
        lines.append(f"| {setting[0]} | {setting[1]:g} | {setting[2]:g} | {' | '.join(cells)} | {total:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
