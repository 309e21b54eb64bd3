"""Generality against near locality of editors that are trained in many ways, at several strengths of their edits.

    python benchmarks/frontier.py [--config FILE] [--out result.json] [--resume] [--only NAME …] [--quick]

There are two testbeds: the built-in atlas, and the model that ``benchmarks/pararel_testbed.py`` trains (skipped if it
was not trained). Every line of the configuration is a preset with some changed settings. It is trained for each of its
seeds and evaluated as ``remend evaluate`` does on the validation split. Nothing is chosen on the test split, which is
measured only for final lines (``"split": "test"``). Times are CPU seconds of the process on one thread, including
calibration and validations.

The result is written after every run; ``--resume`` keeps the runs that it has. A Markdown table is written beside it.
``--quick`` (one seed, few steps and edits, another file) shows that everything works.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import itertools
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import rejected_variants
import remend
from remend.data import read_text
from remend.editors import Mend
from remend.request import EditRequest
from remend.training import PRESETS

METRICS = {
    "reliability": "reliability",
    "generality": "generality",
    "locality_far": "far",
    "locality_near": "near",
    "locality_near_same_object": "same object",
    "locality_near_same_relation": "same relation",
    "locality_near_same_subject": "same subject",
    "elsewhere": "ordinary text",
}
"""The metrics of the table, with the headings of their columns."""

SAME_OBJECT = "locality_near_same_object"

COMPARED_LOCALITY = 0.95
"""Near locality for the same object at which lines are compared."""

QUICK_LINE = {"edits": 8, "requests": 64}
QUICK_STEPS = 4


def requests(testbed: Mapping[str, Any], split: str) -> list[EditRequest]:
    """Return the requests of one split of a testbed."""
    return remend.read_source(testbed["data"].format(split))


def train_and_evaluate(
    testbed: Mapping[str, Any], line: Mapping[str, Any], seed: int, scales: Sequence[float]
) -> dict[str, Any]:
    """Train once, evaluate at every scale, and return the figures."""
    task = remend.load(testbed["model"], "cpu")
    network, settings = PRESETS[line["preset"]]
    network = replace(network, **line.get("network", {}))
    settings = replace(settings, seed=seed, **line.get("training", {}))
    training, validation = requests(testbed, "train"), requests(testbed, "validation")
    evaluated = requests(testbed, line.get("split", "validation"))
    if "share" in line:  # of the facts: all requests of a fact are kept, or none
        training = [request for request in training if random.Random(request.key).random() < line["share"]]
    if line.get("drop_near"):
        training = [request.model_copy(update={"near": ()}) for request in training]
    if edits := line.get("edits"):
        training, validation, evaluated = training[: line["requests"]], validation[:edits], evaluated[:edits]
    start = time.process_time()
    variant = rejected_variants.VARIANTS.get(line.get("variant", ""))
    editor_class = variant.editor if variant else Mend
    editor = editor_class.create(task, network, modules=line.get("modules", ()), seed=seed)
    if variant:
        rejected_variants.train(task, editor, training, settings, variant)
    else:
        text = read_text(common.HERE.parent / line["text"]) if "text" in line else ()
        editor = remend.train(task, training, validation, editor=editor, config=settings, text=text)
    seconds = time.process_time() - start
    report = remend.evaluate(task, editor, evaluated, strengths=scales, baselines=False)
    frontier = [
        {
            "scale": scale,
            **{
                name: {"mean": value.mean, "ci95": value.ci95}
                for name in (*METRICS, "generality_unseen")
                if name in metrics
                for value in [metrics[name].get("generated") or metrics[name]["value"]]
            },
        }
        for scale, metrics in report.frontier_metrics().items()
    ]
    return {
        "testbed": testbed["name"],
        "name": line["name"],
        "split": line.get("split", "validation"),
        "seed": seed,
        "seconds": seconds,
        "steps": editor.trained.get("steps", settings.max_steps),
        "edits": len(evaluated),
        "milliseconds_an_edit": 1000 * report.runs[0].seconds_per_edit,
        "frontier": frontier,
        "best": at_best_strengths(report),
    }


def at_best_strengths(report: remend.Report) -> dict[str, float]:
    """Return means over edits with each edit at its best strength, an upper bound for any rule that chooses strengths.

    The best of the measured strengths has the largest sum of reliability, generality and near locality.
    """
    best_values: dict[str, list[float]] = {}
    for cases in zip(*report.frontier.values(), strict=True):
        values = [
            {
                name: modes["generated"]
                for name, modes in case.values.items()
                if name in METRICS and "generated" in modes
            }
            for case in cases
        ]
        sums = [
            sum(metrics.get(name, 0) for name in ("reliability", "generality", "locality_near")) for metrics in values
        ]
        for name, value in values[sums.index(max(sums))].items():
            best_values.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in best_values.items()}


def at_scale_one(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the means of a run at scale 1, by metric."""
    point = next(point for point in result["frontier"] if point["scale"] == 1)
    return {name: point[name]["mean"] for name in METRICS if name in point}


def generality_at(result: Mapping[str, Any], locality: float = COMPARED_LOCALITY) -> float | None:
    """Return a run's generality at the strength where near locality for the same object is ``locality``.

    It is interpolated linearly between the two measured strengths around it; None if all measured strengths are on one
    side of it.
    """
    points = [
        (point[SAME_OBJECT]["mean"], point["generality"]["mean"])
        for point in result["frontier"]
        if SAME_OBJECT in point
    ]
    for (higher, weaker), (lower, stronger) in itertools.pairwise(points):
        if higher >= locality > lower:
            return float(weaker + (stronger - weaker) * (higher - locality) / (higher - lower))
    return None


def table(config: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a row for each line of the configuration: means, smallest and largest over the seeds."""
    text = ["# What was tried for edits that stay on their subject", "", config["about"], ""]
    for testbed in config["testbeds"]:
        for split in ("test", "validation"):
            results = [run for run in runs if run["testbed"] == testbed["name"] and run["split"] == split]
            if not results:
                continue
            text += [f"## {testbed['title']}, {split} split ({results[0]['edits']} edits)", ""]
            head = ["", "seeds", "seconds", *METRICS.values(), f"generality at same object {COMPARED_LOCALITY}"]
            text += ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
            for line in config["lines"]:
                of_line = [run for run in results if run["name"] == line["name"]]
                if of_line:
                    means = [{**at_scale_one(run), "compared": generality_at(run)} for run in of_line]
                    text.append(_row(line["title"], of_line, means))
                if of_line and line.get("best") and all("best" in run for run in of_line):
                    title = line["title"] + ", each edit at the strength that is best for its own probes"
                    text.append(_row(title, of_line, [run["best"] for run in of_line]))
            text.append("")
    return "\n".join(text)


def _row(title: str, runs: Sequence[Mapping[str, Any]], means: Sequence[Mapping[str, float | None]]) -> str:
    cells = []
    for metric in (*METRICS, "compared"):
        values = [value for of_run in means if (value := of_run.get(metric)) is not None]
        if not values:
            cells.append("")
            continue
        spread = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
        cells.append(f"{sum(values) / len(values):.3f}{spread}")
    seconds = sum(run["seconds"] for run in runs) / len(runs)
    return f"| {title} | {len(runs)} | {seconds:.0f} | " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the runs that the result lacks, and write it after each run."""
    parser = common.parser(__doc__, "frontier")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the result has")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these lines of the configuration")
    parser.add_argument("--testbed", help="only this testbed")
    parser.add_argument("--quick", action="store_true", help="one seed and little time, to see that it works")
    arguments = parser.parse_args(argv)
    config = common.start(arguments)
    if arguments.quick:
        short_training = {"max_steps": QUICK_STEPS, "validate_every": QUICK_STEPS}
        config["lines"] = [
            {**line, **QUICK_LINE, "seeds": [0], "training": {**line.get("training", {}), **short_training}}
            for line in config["lines"]
        ]
        if arguments.out == parser.get_default("out"):
            arguments.out = Path("runs/frontier-quick.json")
    runs: list[dict[str, Any]] = []
    if arguments.resume and arguments.out.exists():
        runs = json.loads(arguments.out.read_text())["runs"]
    done = {(run["testbed"], run["name"], run["seed"]) for run in runs}
    for testbed in config["testbeds"]:
        available = testbed["name"] == "atlas" or Path(testbed["model"]).exists()
        if arguments.testbed not in (None, testbed["name"]) or not available:
            print(f"{testbed['name']}: skipped")
            continue
        for line in config["lines"]:
            has_testbed = testbed["name"] in line.get("testbeds", [testbed["name"]])
            if not has_testbed or (arguments.only and line["name"] not in arguments.only):
                continue
            for seed in line["seeds"]:
                if (testbed["name"], line["name"], seed) in done:
                    continue
                runs.append(train_and_evaluate(testbed, line, seed, config["scales"]))
                means = {METRICS[name]: round(value, 3) for name, value in at_scale_one(runs[-1]).items()}
                print(f"{testbed['name']}, {line['name']}, seed {seed}: {means}", flush=True)
                common.write(arguments.out, config, {"runs": runs})
                arguments.out.with_suffix(".md").write_text(table(config, runs), encoding="utf-8")


if __name__ == "__main__":
    main()
