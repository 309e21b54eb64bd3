"""What many edits at once have to tell apart: how a paraphrase answers to its edit, and all other prompts to all edits.

    python benchmarks/together.py

An edit acts at a prompt as far as the prompt's key answers to the edit's, which answers to itself with 1. Strength and
gates only decide from which answer on an edit has an effect: no paraphrase that answers with less than a prompt that
must stay can be had without changing that. This measures the answers (the mean over the edited matrices; of the prompts
that must stay, the largest to any edit) on validation splits, and how many of these prompts pass a threshold that some
share of the paraphrases passes. What many edits add up to where none answers much comes on top.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import common
import remend
from remend.core.capture import capture_gradient_factors
from remend.data import read_source
from remend.edit import Edit
from remend.editors import Mend, make
from remend.editors.packing import active_rows
from remend.evaluation.probe_filter import in_company
from remend.fingerprint import find_modules
from remend.request import EditRequest
from remend.tasks.base import Example, Task

PAIRS_AT_ONCE = 32


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each world, and write what was found as JSON and as a table beside it."""
    arguments = common.parser(__doc__, "together").parse_args(argv)
    config = common.start(arguments)
    found = {world: measure(world, name, config) for world, name in config["worlds"].items()}
    common.write(arguments.out, config, {"worlds": found})
    arguments.out.with_suffix(".md").write_text(table(found, config), encoding="utf-8")


def measure(world: str, name: str, config: dict[str, Any]) -> list[dict[str, float]]:
    """For each share of paraphrases that pass a threshold, what else passes it; means over the seeds."""
    task = remend.load(world, "cpu")
    editor = Mend.from_pretrained(name) if name == "atlas" else make(name, task)
    task, rows = task, []
    for seed in config["seeds"]:
        requests = random.Random(f"together {seed}").sample(read_source(f"{world}:validation"), config["edits"])
        edits = editor.edit_each(task, requests)
        rows.append(answers(task, requests, edits, config["kept"]))
    return [
        {"kept": kept, **{key: sum(row[place][key] for row in rows) / len(rows) for key in rows[0][place]}}
        for place, kept in enumerate(config["kept"])
    ]


def answers(
    task: Task, requests: Sequence[EditRequest], edits: Sequence[Edit], shares: Sequence[float]
) -> list[dict[str, float]]:
    """The threshold that each share of the paraphrases passes, and the shares of other prompts that pass it."""
    directions = {name: torch.stack([edit.changes[name].u[0] for edit in edits]) for name in edits[0].changes}
    own = keys(task, [task.encode(request.prompt, request.target) for request in requests], edits)
    sizes = {name: (own[name] * u).sum(1) for name, u in directions.items()}

    def of(pairs: Sequence[Example]) -> Tensor:
        read = keys(task, pairs, edits)
        return torch.stack([read[name] @ u.mT / sizes[name] for name, u in directions.items()]).mean(0)

    whose = [e for e, request in enumerate(requests) for _ in request.paraphrases]
    alike = of([task.encode(text, request.target) for request in requests for text in request.paraphrases])
    alike = alike[torch.arange(len(whose)), torch.tensor(whose)]
    staying, _ = in_company(requests)
    others = {
        kind: of([task.encode(probe.prompt, probe.target) for request in staying for probe in getattr(request, kind)])
        for kind in ("locality", "near")
    }
    found = []
    for share in shares:
        threshold = float(alike.quantile(1 - share))
        passing = {kind: float((own.max(1).values > threshold).float().mean()) for kind, own in others.items()}
        found.append({"threshold": threshold, **passing})
    return found


def keys(task: Task, pairs: Sequence[Example], edits: Sequence[Edit]) -> dict[str, Tensor]:
    """What each edited matrix reads where the first token of each pair's target is predicted."""
    modules = find_modules(task.model, edits[0].changes)
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        batch = task.collate(pairs[start : start + PAIRS_AT_ONCE])
        tokens = task.token_masks(batch, modules, predicting=True)
        factors = capture_gradient_factors(task.model, modules, tokens, lambda batch=batch: task.loss(batch))[1]
        for name, rows in active_rows(factors, torch.device("cpu")).items():
            found[name].append(torch.stack([own[0] for own in rows.u.split(rows.counts)]))
    return {name: torch.cat(own) for name, own in found.items()}


def table(found: dict[str, list[dict[str, float]]], config: dict[str, Any]) -> str:
    """The figures as markdown."""
    lines = [
        f"With {config['edits']} edits at work, of validation requests: the threshold that a share of the paraphrases "
        "passes with its own edit's answer, and how many prompts that must stay pass it with some edit's "
        f"(`python benchmarks/together.py`; means over {len(config['seeds'])} draws of edits).",
        "",
        "| model, editor | paraphrases that pass | threshold | far prompts that pass | near ones |",
        "|---|---|---|---|---|",
    ]
    for world, rows in found.items():
        name = "MEND, `default`" if config["worlds"][world] == "atlas" else config["worlds"][world]
        for row in rows:
            shown = [f"{row['kept']:.2f}", f"{row['threshold']:.2f}", f"{row['locality']:.3f}", f"{row['near']:.3f}"]
            lines.append(f"| {world}, {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
