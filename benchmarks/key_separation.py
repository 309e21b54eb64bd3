"""How well the keys of many edits separate paraphrases from prompts that must not change.

    python benchmarks/key_separation.py

The response of an edit at a prompt is the product of the prompt's key with the edit's, normalized so that it is 1 at
the edited prompt. Strength and gates only choose the response from which on an edit has an effect: if a paraphrase
has a smaller response than a prompt that must not change, no choice gets both right. This measures the responses on
validation splits (the mean over the edited matrices; of the prompts that must not change, the largest response to any
edit), and how many of these prompts pass a threshold that a given share of the paraphrases passes. The sum of many
small responses comes on top.
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
from remend.editors.factor_packing import pack_active
from remend.evaluation.conflicting_probes import filter_probes
from remend.fingerprint import find_modules
from remend.request import EditRequest
from remend.tasks.base import Example, Task

BATCH_SIZE = 32


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each testbed, and write the result as JSON and as a Markdown table."""
    arguments = common.parser(__doc__, "key_separation").parse_args(argv)
    config = common.start(arguments)
    result = {testbed: measure(testbed, editor, config) for testbed, editor in config["testbeds"].items()}
    common.write(arguments.out, config, {"testbeds": result})
    arguments.out.with_suffix(".md").write_text(table(result, config), encoding="utf-8")


def measure(testbed: str, name: str, config: dict[str, Any]) -> list[dict[str, float]]:
    """Return the shares of other prompts that pass, for each share of paraphrases that pass (means over seeds)."""
    task = remend.load(testbed, "cpu")
    editor = Mend.load(name) if name == "atlas" else make(name, task)
    rows = []
    for seed in config["seeds"]:
        # The text is part of the seed: with another one, other requests would be drawn.
        requests = random.Random(f"together {seed}").sample(read_source(f"{testbed}:validation"), config["edits"])
        edits = editor.edit_each(task, requests)
        rows.append(passing_shares(task, requests, edits, config["kept"]))
    return [
        {"kept": kept, **{key: sum(row[index][key] for row in rows) / len(rows) for key in rows[0][index]}}
        for index, kept in enumerate(config["kept"])
    ]


def passing_shares(
    task: Task, requests: Sequence[EditRequest], edits: Sequence[Edit], shares: Sequence[float]
) -> list[dict[str, float]]:
    """Return the threshold that each share of the paraphrases passes, and the shares of other prompts that pass it."""
    directions = {name: torch.stack([edit.changes[name].u[0] for edit in edits]) for name in edits[0].changes}
    edit_keys = read_keys(task, [task.encode(request.prompt, request.target) for request in requests], edits)
    self_responses = {name: (edit_keys[name] * u).sum(1) for name, u in directions.items()}

    def responses(examples: Sequence[Example]) -> Tensor:
        """Return the response of each edit at each example, with shape [example, edit]."""
        keys = read_keys(task, examples, edits)
        return torch.stack([keys[name] @ u.mT / self_responses[name] for name, u in directions.items()]).mean(0)

    edit_of_paraphrase = [index for index, request in enumerate(requests) for _ in request.paraphrases]
    at_paraphrases = responses(
        [task.encode(text, request.target) for request in requests for text in request.paraphrases]
    )
    at_paraphrases = at_paraphrases[torch.arange(len(edit_of_paraphrase)), torch.tensor(edit_of_paraphrase)]
    # Without probes that another of the edits changes on purpose.
    filtered, _ = filter_probes(requests)
    at_probes = {
        kind: responses(
            [task.encode(probe.prompt, probe.target) for request in filtered for probe in getattr(request, kind)]
        )
        for kind in ("locality", "near")
    }
    rows = []
    for share in shares:
        threshold = float(at_paraphrases.quantile(1 - share))
        passing = {kind: float((values.max(1).values > threshold).float().mean()) for kind, values in at_probes.items()}
        rows.append({"threshold": threshold, **passing})
    return rows


def read_keys(task: Task, examples: Sequence[Example], edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Return the input of each edited matrix at the token that predicts the first token of each example's target."""
    modules = find_modules(task.model, edits[0].changes)
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    for start in range(0, len(examples), BATCH_SIZE):
        batch = task.collate(examples[start : start + BATCH_SIZE])
        tokens = task.token_masks(batch, modules, predicting=True)
        factors = capture_gradient_factors(task.model, modules, tokens, lambda batch=batch: task.loss(batch))[1]
        for name, rows in pack_active(factors, torch.device("cpu")).items():
            inputs[name].append(torch.stack([u[0] for u in rows.u.split(rows.counts)]))
    return {name: torch.cat(parts) for name, parts in inputs.items()}


def table(result: dict[str, list[dict[str, float]]], config: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [
        f"With {config['edits']} active edits of validation requests: the threshold that a share of the paraphrases "
        "passes with the response of their own edit, and how many prompts that must not change pass it with that of "
        "some edit "
        f"(`python benchmarks/key_separation.py`; means over {len(config['seeds'])} draws of edits).",
        "",
        "| model, editor | paraphrases that pass | threshold | far prompts that pass | near ones |",
        "|---|---|---|---|---|",
    ]
    for testbed, rows in result.items():
        editor = config["testbeds"][testbed]
        name = "MEND, `default`" if editor == "atlas" else editor
        for row in rows:
            cells = [f"{row['kept']:.2f}", f"{row['threshold']:.2f}", f"{row['locality']:.3f}", f"{row['near']:.3f}"]
            lines.append(f"| {testbed}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
