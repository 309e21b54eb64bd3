"""What mined negatives do: how many prompts that should stay an edit disturbs, with drawn and with mined ones kept.

    python benchmarks/mining.py
    python benchmarks/mining.py --kind low-rank --out build/mining_low_rank.json

Of each validation request the built-in pool (other questions about the subject and the answer, the same of others) is
split in two. From one half, prompts are drawn at random, or mined in rounds of trial edits (``remend.expansion``), and
given to ``fit`` as such that must stay; how many are disturbed is counted in both. The other half tells whether what
was mined carries over. A prompt counts of whose answer the unedited model is sure; it is disturbed if the edited
model's first choice is another one. Generality is the share of ``paraphrases`` that no editor was given.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import remend
from common import HERE, parser, start, write
from real import Base, asked_of, interval, is_right
from remend.data.edit_sets import EditSet, SetItem
from remend.data.request_files import read_requests
from remend.editors import Editor, make_or_load
from remend.editors.locate_then_edit.common_questions import next_tokens
from remend.editors.locate_then_edit.fit import Fit, FitConfig
from remend.evaluation.interventions import shared_intervention
from remend.expansion.mining import TRIAL_EDITS, built_in_pool, mine
from remend.expansion.phrasings import phrasings
from remend.expansion.premise import Premise
from remend.request import EditRequest
from remend.tasks.base import Task

SURE_FROM = 0.2
"""The least probability with which the unedited model answers the prompts that count, as in ``real_requests.py``: lower
than what sets hold, since what it is less sure of is disturbed more often."""

PHRASINGS = 8
"""Phrasings that every variant is given, so that they differ in what is kept only."""

Row = dict[str, float]


def halves(premise: Premise) -> tuple[list[str], list[str]]:
    """Return the sure prompts of the built-in pool in two halves, by their hash."""
    pool = list(dict.fromkeys(built_in_pool(premise)))
    sure = next_tokens(premise.task, pool).amax(1)
    parts: tuple[list[str], list[str]] = ([], [])
    for text, probability in zip(pool, sure.tolist(), strict=True):
        if probability >= SURE_FROM and text != premise.request.prompt:
            parts[hashlib.sha256(text.encode()).digest()[0] % 2].append(text)
    return parts


def drawn(texts: Sequence[str], count: int, seed: str) -> list[SetItem]:
    """Return prompts drawn from a pool, as items that must stay."""
    chosen = random.Random(seed).sample(list(texts), min(count, len(texts)))
    return [SetItem(item="near", kind="drawn", made="at random", prompt=text) for text in chosen]


def disturbed(task: Task, texts: Sequence[str], before: torch.Tensor) -> int:
    """Return how many texts the model goes on from with another token than before."""
    return int((next_tokens(task, texts).argmax(1) != before).sum())


def measure(base: Base, editor: Fit, trial: Editor, request: EditRequest, config: Mapping[str, Any]) -> dict[str, Row]:
    """Return what each variant does to one request: the shares disturbed of both halves, and generality."""
    task = base.task
    assert editor.questions is not None
    bare = EditRequest(prompt=request.prompt, target=request.target, subject=request.subject, id=request.id)
    premise = Premise.of(task, bare, editor.questions)
    plain = EditSet(premise.request, tuple(phrasings(premise, PHRASINGS)))
    mined_from, other = halves(premise)
    first = {name: next_tokens(task, texts).argmax(1) for name, texts in (("own", mined_from), ("other", other))}
    sets = {"none": plain}
    seconds = dict.fromkeys(sets, 0.0)
    for rounds in range(1, config["rounds"] + 1):
        began = time.process_time()
        # Each round goes on from the set of the one before.
        before = sets.get(f"mined, {rounds - 1} rounds", plain)
        sets[f"mined, {rounds} rounds"], _ = mine(premise, trial, before, mined_from, (), 1, config["most"])
        seconds[f"mined, {rounds} rounds"] = time.process_time() - began
        items = drawn(mined_from, rounds * config["most"], f"{request.id} {rounds}")
        sets[f"drawn, {rounds} rounds"] = EditSet(plain.request, (*plain.items, *items))
    rows: dict[str, Row] = {}
    for name, edit_set in sets.items():
        edit = editor.edit(task, [edit_set.as_request()])
        given = edit_set.as_request().given_paraphrases
        asked = [prompt for kind, prompt, _ in asked_of(request, given) if kind in ("reliability", "generality")]
        with shared_intervention(task, edit, 1).applied([0]):
            answers = task.predict(asked, base.new_tokens)
            counts = {
                half: disturbed(task, texts, first[half]) for half, texts in (("own", mined_from), ("other", other))
            }
        right = [is_right(task, prompt, answer, request.target) for prompt, answer in zip(asked, answers, strict=True)]
        rows[name] = {
            "reliability": float(right[0]),
            **({"generality": sum(right[1:]) / len(right[1:])} if right[1:] else {}),
            "own half": counts["own"] / len(mined_from),
            "other half": counts["other"] / len(other),
            "kept": float(len(edit_set.of("near"))),
            "seconds": seconds.get(name, 0.0),
        }
    return rows


def run(config: Mapping[str, Any], out: Path) -> None:
    """Measure the requests; what was measured is kept, and not measured again."""
    task = remend.load(str(HERE.parent / config["model"]))
    requests = read_requests(HERE.parent / config["requests"])[: config["count"]]
    lines = (HERE.parent / config["text"]).read_text(encoding="utf-8").splitlines()
    text = [line.strip() for line in lines if len(line) > 200]
    kind = config["kind"]
    editor = make_or_load(Fit.info.name, task, text, config["seed"], FitConfig(kind=kind))
    assert isinstance(editor, Fit)
    trial = make_or_load(Fit.info.name, task, text, config["seed"], replace(TRIAL_EDITS, kind=kind))
    base = Base(task, text, 0, config["new_tokens"])
    kept = out.with_suffix(".rows.jsonl")
    done: dict[str, dict[str, Row]] = {}
    if kept.exists():
        done = dict(json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines())
    for number, request in enumerate(requests, start=1):
        if str(request.id) not in done:
            done[str(request.id)] = measure(base, editor, trial, request, config)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps([str(request.id), done[str(request.id)]]) + "\n")
        print(f"{number} of {len(requests)}: {done[str(request.id)]}", file=sys.stderr, flush=True)
        measured = [done[str(each.id)] for each in requests if str(each.id) in done]
        results = {
            name: {
                column: interval([row[name][column] for row in measured if column in row[name]])
                for column in ("reliability", "generality", "own half", "other half", "kept", "seconds")
                if any(column in row[name] for row in measured)
            }
            for name in measured[0]
        }
        write(out, config, {"requests": len(measured), "results": results})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = parser(__doc__, "mining")
    options.add_argument("--kind", choices=("units", "low-rank"), help="what the edits are made of")
    options.add_argument("--count", type=int)
    parsed = options.parse_args(arguments)
    config = start(parsed)
    config |= {name: value for name in ("kind", "count") if (value := getattr(parsed, name)) is not None}
    run(config, parsed.out)


if __name__ == "__main__":
    main()
