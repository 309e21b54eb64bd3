"""Success against near locality: what an editor trained in each of many ways does, at every strength of its edits.

    python benchmarks/frontier.py [--config FILE] [--out result.json] [--resume] [--only NAME …] [--quick]

Two worlds: the built-in atlas, and the model that ``benchmarks/pararel.py`` trains (passed over where it was not
trained). Every line of the configuration is a preset with some settings changed; each is trained anew for each of its
seeds and evaluated as ``remend evaluate`` does, on the validation split: nothing is chosen on the test split, which is
measured for the lines that ask for it (``"split": "test"``), once they are what they are. CPU seconds of the process
on one thread, calibration and validations included.

The result is written after every run; ``--resume`` keeps the runs that it has already. A table (Markdown) is written
beside it. ``--quick`` (one seed, few steps and edits, another file) shows that everything works.
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
import remend
import variants
from remend.data import read_text
from remend.editors import Mend
from remend.request import EditRequest
from remend.training import PRESETS

SHOWN = {
    "reliability": "reliability",
    "generality": "generality",
    "locality_far": "far",
    "locality_near": "near",
    "locality_near_same_object": "same object",
    "locality_near_same_relation": "same relation",
    "locality_near_same_subject": "same subject",
}
"""Metrics of the table, by their column."""

SAME_OBJECT = "locality_near_same_object"

BAR = 0.95
"""Near locality for the same object, at which lines are compared."""

QUICK = {"edits": 8, "requests": 64}
QUICK_STEPS = 4


def requests(world: Mapping[str, Any], split: str) -> list[EditRequest]:
    """The requests of one split of a world."""
    return remend.read_source(world["data"].format(split))


def run(world: Mapping[str, Any], line: Mapping[str, Any], seed: int, scales: Sequence[float]) -> dict[str, Any]:
    """Train once and evaluate at every scale."""
    task = remend.load(world["model"], "cpu")
    network, settings = PRESETS[line["preset"]]
    network = replace(network, **line.get("network", {}))
    settings = replace(settings, seed=seed, **line.get("training", {}))
    learnt, validation = requests(world, "train"), requests(world, "validation")
    judged = requests(world, line.get("split", "validation"))
    if "share" in line:  # of the facts, whatever their targets
        learnt = [request for request in learnt if random.Random(request.key).random() < line["share"]]
    if line.get("drop_near"):
        learnt = [request.model_copy(update={"near": ()}) for request in learnt]
    if edits := line.get("edits"):
        learnt, validation, judged = learnt[: line["requests"]], validation[:edits], judged[:edits]
    began = time.process_time()
    variant = variants.VARIANTS.get(line.get("variant", ""))
    kind = variant.editor if variant else Mend
    editor = kind.create(task, network, modules=line.get("modules", ()), seed=seed)
    if variant:
        variants.train(task, editor, learnt, settings, variant)
    else:
        text = read_text(common.HERE.parent / line["text"]) if "text" in line else ()
        editor = remend.train(task, learnt, validation, editor=editor, config=settings, text=text)
    seconds = time.process_time() - began
    report = remend.evaluate(task, editor, judged, scales=scales, baselines=False)
    frontier = [
        {
            "scale": scale,
            **{
                name: {"mean": own[name]["generated"].mean, "ci95": own[name]["generated"].ci95}
                for name in (*SHOWN, "generality_unseen")
                if name in own
            },
        }
        for scale, own in report.frontier_metrics().items()
    ]
    return {
        "world": world["name"],
        "name": line["name"],
        "split": line.get("split", "validation"),
        "seed": seed,
        "seconds": seconds,
        "steps": editor.trained.get("steps", settings.max_steps),
        "edits": len(judged),
        "milliseconds_an_edit": 1000 * report.runs[0].seconds_per_edit,
        "frontier": frontier,
        "best": best(report),
    }


def best(report: remend.Report) -> dict[str, float]:
    """Means over edits, were each as strong as is best for its own prompts: what no rule for the strength surpasses.

    Of the measured strengths the one with the largest sum of reliability, generality and near locality is taken.
    """
    found: dict[str, list[float]] = {}
    for cases in zip(*report.frontier.values(), strict=True):
        values = [{name: own["generated"] for name, own in case.values.items() if name in SHOWN} for case in cases]
        sums = [sum(own.get(name, 0) for name in ("reliability", "generality", "locality_near")) for own in values]
        for name, value in values[sums.index(max(sums))].items():
            found.setdefault(name, []).append(value)
    return {name: sum(own) / len(own) for name, own in found.items()}


def at_one(one: Mapping[str, Any]) -> dict[str, float]:
    """What a run's edits do as they are, by metric."""
    point = next(point for point in one["frontier"] if point["scale"] == 1)
    return {name: point[name]["mean"] for name in SHOWN if name in point}


def generality_at(one: Mapping[str, Any], locality: float = BAR) -> float | None:
    """The generality of a run at the strength where near locality for the same object is ``locality``.

    On a straight line between the two measured strengths around it; None where no measured strength is so local, or
    all are.
    """
    points = [(p[SAME_OBJECT]["mean"], p["generality"]["mean"]) for p in one["frontier"] if SAME_OBJECT in p]
    for (more, weaker), (less, stronger) in itertools.pairwise(points):
        if more >= locality > less:
            return float(weaker + (stronger - weaker) * (more - locality) / (more - less))
    return None


def table(config: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """One line for each way of training: means over the seeds, and what the seeds spread over."""
    text = ["# What was tried for edits that stay on their subject", "", config["about"], ""]
    for world in config["worlds"]:
        for split in ("test", "validation"):
            own = [one for one in runs if one["world"] == world["name"] and one["split"] == split]
            if not own:
                continue
            text += [f"## {world['title']}, {split} split ({own[0]['edits']} edits)", ""]
            head = ["", "seeds", "seconds", *SHOWN.values(), f"generality at same object {BAR}"]
            text += ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
            for line in config["lines"]:
                members = [one for one in own if one["name"] == line["name"]]
                if members:
                    text.append(
                        _row(line["title"], members, [{**at_one(one), "bar": generality_at(one)} for one in members])
                    )
                if members and line.get("best") and all("best" in one for one in members):
                    title = line["title"] + ", each edit at the strength that is best for its own probes"
                    text.append(_row(title, members, [one["best"] for one in members]))
            text.append("")
    return "\n".join(text)


def _row(title: str, members: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, float | None]]) -> str:
    cells = []
    for metric in (*SHOWN, "bar"):
        values = [value for own in found if (value := own.get(metric)) is not None]
        if not values:
            cells.append("")
            continue
        spread = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
        cells.append(f"{sum(values) / len(values):.3f}{spread}")
    seconds = sum(one["seconds"] for one in members) / len(members)
    return f"| {title} | {len(members)} | {seconds:.0f} | " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the result does not have yet, and write it after each run."""
    parser = common.parser(__doc__, "frontier")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the result has already")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these lines of the configuration alone")
    parser.add_argument("--world", help="this world alone")
    parser.add_argument("--quick", action="store_true", help="one seed and little time, to see that it works")
    arguments = parser.parse_args(argv)
    config = common.start(arguments)
    if arguments.quick:
        few = {"max_steps": QUICK_STEPS, "validate_every": QUICK_STEPS}
        config["lines"] = [
            {**line, **QUICK, "seeds": [0], "training": {**line.get("training", {}), **few}} for line in config["lines"]
        ]
        if arguments.out == parser.get_default("out"):
            arguments.out = Path("runs/frontier-quick.json")
    runs: list[dict[str, Any]] = []
    if arguments.resume and arguments.out.exists():
        runs = json.loads(arguments.out.read_text())["runs"]
    done = {(one["world"], one["name"], one["seed"]) for one in runs}
    for world in config["worlds"]:
        if arguments.world not in (None, world["name"]) or (
            world["name"] != "atlas" and not Path(world["model"]).exists()
        ):
            print(f"{world['name']}: passed over")
            continue
        for line in config["lines"]:
            wanted = world["name"] in line.get("worlds", [world["name"]])
            if not wanted or (arguments.only and line["name"] not in arguments.only):
                continue
            for seed in line["seeds"]:
                if (world["name"], line["name"], seed) in done:
                    continue
                runs.append(run(world, line, seed, config["scales"]))
                found = {SHOWN[name]: round(value, 3) for name, value in at_one(runs[-1]).items()}
                print(f"{world['name']}, {line['name']}, seed {seed}: {found}", flush=True)
                common.write(arguments.out, config, {"runs": runs})
                arguments.out.with_suffix(".md").write_text(table(config, runs), encoding="utf-8")


if __name__ == "__main__":
    main()
