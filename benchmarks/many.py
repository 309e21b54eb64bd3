"""Many corrections in one edit of a real language model: whether they take, generalise, and leave the rest.

    make real && python benchmarks/real_requests.py build/real/smollm2
    python benchmarks/many.py --split test --count 100 --only 'fit, units'

One edit is made of all requests. Each request is then asked with the edit applied, as benchmarks/real.py asks it of an
edit of its own: all of them for their own prompts, and the first ``scored`` for every other kind. Near and unrelated
prompts about a subject that is edited are left out: they are meant to change. Columns are means over requests of the
shares of their prompts, with 95 % bootstrap intervals; text is measured once, with an interval over its windows.

Of an edit that knows what of it each request is, ``removed`` requests are left out one at a time: ``restored`` is the
share of which the old answer is back, ``others_changed`` the share of other requests' answers that change.

``given`` phrasings of each request are taught with it and are not scored. An edit is kept in ``build/real/many`` and
not made again.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import remend
from common import HERE, parser, start, write
from real import RIGHT, Base, Row, answers_of, asked_of, interval, make_editor, passages, shares, summary, table
from remend.data.request_files import read_requests
from remend.edit import Edit
from remend.editors.edit_in_parts import edit_in_parts, remove_parts
from remend.evaluation.conflicting_probes import SubjectIndex
from remend.evaluation.interventions import Intervention, shared_intervention
from remend.request import EditRequest
from remend.tasks.base import Task

P, T = ParamSpec("P"), TypeVar("T")

REPORTED_EVERY = 20
"""Requests after which the benchmark says how far it is."""

OTHERS = 50
"""Other requests that are asked once one is left out."""


def teach(requests: Sequence[EditRequest], given: int) -> list[EditRequest]:
    """Return what an editor is told of requests: the pair, the subject, and some phrasings."""
    return [
        EditRequest(
            prompt=request.prompt,
            target=request.target,
            subject=request.subject,
            id=request.id,
            given_paraphrases=request.paraphrases[:given],
        )
        for request in requests
    ]


def make(task: Task, variant: Mapping[str, Any], told: Sequence[EditRequest], text: Sequence[str], kept: Path) -> Edit:
    """Return the edit of a variant, from the folder ``kept`` if it is there; its editor notes the CPU seconds.

    One that is made in parts goes on where it was stopped.
    """
    if not kept.exists():
        editor = make_editor(task, variant, text)
        seconds = Seconds(kept.with_name("seconds.txt"))
        if editor.info.sequence == "unedited" and not variant.get("summed"):
            with patch.object(editor, "edit", seconds.of(editor.edit)):
                edit = edit_in_parts(editor, task, told, kept.with_name("parts"), resume=True)
        elif variant.get("summed"):
            edit = without_keys(seconds.of(editor.edit_each)(task, told))
        else:
            edit = seconds.of(editor.edit)(task, told)
        assert isinstance(edit, Edit)
        replace(edit, editor={**edit.editor, "seconds": seconds.total}).save(kept)
        remove_parts(kept.with_name("parts"))
    return Edit.load(kept)


class Seconds:
    """The CPU seconds of calls, kept in a file so that those before a stop count, too.

    Args:
        file: the file, a line for each call.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    @property
    def total(self) -> float:
        """The sum of all calls."""
        return sum(map(float, self.file.read_text().split()))

    def of(self, call: Callable[P, T]) -> Callable[P, T]:
        """Return the same function, whose calls count."""

        def counted(*args: P.args, **kwargs: P.kwargs) -> T:
            began = time.process_time()
            result = call(*args, **kwargs)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(f"{time.process_time() - began}\n")
            print(f"{len(self.file.read_text().split())} calls of the editor", file=sys.stderr, flush=True)
            return result

        return counted


def without_keys(edits: Sequence[Edit]) -> Edit:
    """Return the sum of edits as if nothing were known of the inputs that they were made for: the former sum."""
    plain = [
        replace(edit, changes={name: replace(change, keys=None) for name, change in edit.changes.items()})
        for edit in edits
    ]
    return Edit.sum(plain)


def score(
    base: Base,
    requests: Sequence[EditRequest],
    told: Sequence[EditRequest],
    scored: int,
    intervention: Intervention,
    rows: Rows,
) -> None:
    """Add what is not in ``rows`` yet: the shares of each request's prompts with the edit of all requests applied."""
    subjects = SubjectIndex(requests)
    for number, (request, taught) in enumerate(zip(requests, told, strict=True)):
        if str(request.id) in rows:
            continue
        asked = [
            (name, prompt, target)
            for name, prompt, target in asked_of(request, taught.given_paraphrases)
            if name == "reliability"
            or (number < scored and (name in RIGHT or not subjects.mentioned_in(prompt) - {request.key}))
        ]
        prompts = [prompt for _, prompt, _ in asked]
        base.ask(prompts)
        answers = answers_of(base, intervention, number, prompts)
        rows.add(str(request.id), shares(base, request, asked, answers))
        if number % REPORTED_EVERY == 0:
            print(f"{number + 1} of {len(requests)} requests are scored", file=sys.stderr, flush=True)


class Rows(dict[str, Row]):
    """What was measured of each request with one variant's edit, kept in a file line by line.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        if path.exists():
            self.update(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())

    def add(self, identifier: str, row: Row) -> None:
        """Add a row, and write it to the file."""
        self[identifier] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([identifier, row]) + "\n")


def removals(base: Base, requests: Sequence[EditRequest], edit: Edit, count: int) -> dict[str, dict[str, float]]:
    """Return in what share of cases leaving one request out restores its old answer, and changes those of others."""
    if any(change.owners is None for change in edit.changes.values()):
        return {}
    task, prompts = base.task, [request.prompt for request in requests]
    base.ask(prompts)
    with edit.applied(task.model):
        edited = task.predict(prompts, base.new_tokens)
    restored, changed = [], []
    for number in range(0, len(requests), max(1, len(requests) // count)):
        others = random.Random(number).sample(range(len(requests)), min(OTHERS, len(requests)))
        asked = [number, *(other for other in others if other != number)]
        with edit.without(number).applied(task.model):
            own, *rest = task.predict([prompts[index] for index in asked], base.new_tokens)
        before = task.answer_span(prompts[number], base.answers[prompts[number]])
        restored.append(float(task.gives(prompts[number], own, before)))
        changed.append(sum(edited[i] != answer for i, answer in zip(asked[1:], rest, strict=True)) / len(rest))
    return {"restored": interval(restored), "others_changed": interval(changed)}


def on_text(base: Base, intervention: Intervention) -> dict[str, dict[str, float]]:
    """Return the share of choices that stay and the ratio of perplexities, with intervals over windows of text."""
    (elsewhere,) = base.text.measure(intervention)
    found = {"text": elsewhere.stays, "perplexity": elsewhere.perplexity_ratio}
    return {
        name: {"mean": value.mean, "low": value.ci95[0], "high": value.ci95[1], "requests": value.n}
        for name, value in found.items()
        if value is not None
    }


def run(config: Mapping[str, Any], out: Path, only: Sequence[str]) -> None:
    """Measure the variants that are asked for."""
    task = remend.load(str(HERE.parent / config["model"]))
    requests = read_requests(HERE.parent / config["requests"].format(split=config["split"]))[: config["count"]]
    text, other = passages(config)
    base = Base(task, other, config["text_tokens"], config["new_tokens"])
    results: list[dict[str, Any]] = []
    for variant in config["variants"]:
        name = variant["name"]
        if only and name not in only:
            continue
        kept = HERE.parent / "build" / "real" / "many" / f"{config['split']}-{len(requests)}" / name
        told = teach(requests, variant.get("given", 0))
        edit = make(task, variant, told, text, kept / "edit")
        rows = Rows(kept / "rows.jsonl")
        intervention = shared_intervention(task, edit, len(requests))
        score(base, requests, told, config["scored"], intervention, rows)
        results.append(
            {
                **summary(variant, [row | {"seconds": edit.editor["seconds"] / len(told)} for row in rows.values()]),
                **on_text(base, intervention),
                **removals(base, requests, edit, config["removed"]),
            }
        )
        write(out, config, {"requests": len(requests), "results": results})
        out.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__, "many")
    arguments.add_argument("--split", choices=("validation", "test"))
    arguments.add_argument("--count", type=int, help="the requests of the edit")
    arguments.add_argument("--only", action="append", default=[], metavar="NAME", help="a variant's name")
    parsed = arguments.parse_args()
    config = start(parsed)
    config |= {name: value for name in ("split", "count") if (value := getattr(parsed, name)) is not None}
    run(config, parsed.out, parsed.only)


if __name__ == "__main__":
    main()
