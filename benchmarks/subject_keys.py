"""Which layer's input tells many subjects apart: for a memory that looks up whom a text is about.

    make real && python benchmarks/real_requests.py build/real/smollm2
    python benchmarks/subject_keys.py

Each of ``entries`` subjects has a key, the mean input of a layer at its last token in some texts that name it. A text
is looked up by the cosine between its tokens and all keys, in the space in which ordinary text has unit covariance.

Of each layer: the share of other phrasings about a subject whose nearest key is its own (``nearest``); and, with the
threshold that lets the share ``recall`` of them pass, how many near prompts about subjects that have no entry pass at
some token (``near``), and how many tokens of ordinary text (``text``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import remend
from common import HERE, parser, start, write
from real import passages
from real_requests import SOURCE, World
from remend.core.capture import record_inputs
from remend.data.request_files import read_requests
from remend.editors.locate_then_edit.subject_mentions import mentions
from remend.editors.locate_then_edit.subject_prompts import Located, located_subject, random_beginnings
from remend.errors import RequestError
from remend.evaluation.conflicting_probes import SubjectIndex
from remend.fingerprint import find_modules
from remend.models.frozen_prefix import run_as_far_as
from remend.request import EditRequest
from remend.tasks.base import Example, Task

MENTIONS, BEGINNINGS, PHRASINGS = 3, 2, 6
"""Texts of a key beside the prompt by itself: other mentions, and beginnings before the prompt; phrasings looked up."""

BATCH = 64
FLOOR = 0.01
"""What is added to the covariance's eigenvalues, as a share of their mean."""


def texts_of(task: Task, request: EditRequest, beginnings: Sequence[str]) -> list[Located]:
    """Return the texts of a subject's key."""
    subject = str(request.subject)
    prompts = [str(request.prompt), *(f"{beginning} {request.prompt}" for beginning in beginnings)]
    return [*(located_subject(task, prompt, subject) for prompt in prompts), *list(mentions(task, request))[:MENTIONS]]


@torch.no_grad()
def inputs(task: Task, names: Sequence[str], located: Sequence[Located], all_tokens: bool = False) -> dict[str, Any]:
    """Return some layers' inputs at one token of each text, or at all tokens, a tensor for each text."""
    modules = find_modules(task.model, list(names))
    order = sorted(range(len(located)), key=lambda index: len(located[index][0].input))
    found: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(located) for name in names}
    for begin in range(0, len(order), BATCH):
        part = order[begin : begin + BATCH]
        batch = task.collate([located[index][0] for index in part])
        run = partial(run_as_far_as, task.model, modules.values(), partial(task.outputs, batch))
        recorded = record_inputs(task.model, modules, batch.rows, run)
        for name in names:
            x = recorded[name].x.view(*batch.mask.shape, -1).float()
            for row, index in enumerate(part):
                found[name][index] = x[row][batch.mask[row]] if all_tokens else x[row, located[index][1]]
    return found if all_tokens else {name: torch.stack(rows) for name, rows in found.items()}


def look_up(
    keys: Tensor, owner: Tensor, phrasings: Tensor, of_subject: Tensor, near: Sequence[Tensor], text: Tensor,
    ordinary: Tensor, recalls: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    """Return how one layer's inputs tell subjects apart."""
    mean = ordinary.double().mean(0)
    centred = ordinary.double() - mean
    covariance = centred.mT @ centred / len(centred)
    covariance += FLOOR * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)

    def direction(x: Tensor) -> Tensor:
        whitened = torch.linalg.solve_triangular(factor, (x.double() - mean).mT, upper=False).mT
        return torch.nn.functional.normalize(whitened, dim=1)

    sums = torch.zeros(int(owner.max()) + 1, keys.shape[1]).index_add(0, owner, keys)
    entries = direction(sums / owner.bincount()[:, None])
    answers = direction(phrasings) @ entries.mT
    own = answers[torch.arange(len(answers)), of_subject]
    near_best = torch.stack([(direction(tokens) @ entries.mT).max() for tokens in near])
    text_best = (direction(text) @ entries.mT).amax(1)
    row: dict[str, Any] = {"nearest": float((answers.argmax(1) == of_subject).double().mean())}
    for recall in recalls:
        threshold = torch.quantile(own, 1 - recall)
        row[f"recall {recall}"] = {
            "threshold": float(threshold),
            "near": float((near_best > threshold).double().mean()),
            "text": float((text_best > threshold).double().mean()),
        }
    return row


def run(config: Mapping[str, Any], out: Path) -> None:
    """Measure every layer."""
    task = remend.load(str(HERE.parent / config["model"]))
    requests = read_requests(HERE.parent / config["requests"].format(split=config["split"]))
    ordinary, other = passages(config)
    beginnings = random_beginnings(ordinary, BEGINNINGS, config["seed"])
    known = {request.subject for request in requests}
    facts = [fact for fact in World(SOURCE).facts(config["split"]) if fact.subject not in known]
    others = [EditRequest(prompt=f.phrasing.format(f.subject), target=f.target, subject=f.subject) for f in facts]
    subjects = [*requests, *others][: config["entries"]]
    located, owner = [], []
    for number, request in enumerate(subjects):
        texts = texts_of(task, request, beginnings)
        located += texts
        owner += [number] * len(texts)
    phrasings, of_subject = [], []
    for number, request in enumerate(requests):
        for prompt in (*request.paraphrases, *request.unseen_paraphrases)[:PHRASINGS]:
            try:
                phrasings.append(located_subject(task, prompt, str(request.subject)))
            except RequestError:  # a phrasing that writes the subject otherwise
                continue
            of_subject.append(number)
    index = SubjectIndex(subjects)
    near = [str(probe.prompt) for request in requests for probe in request.near if probe.kind != "same_subject"]
    near = [prompt for prompt in near if not index.mentioned_in(prompt)][: config["near"]]

    def encoded(texts: Sequence[str]) -> list[Located]:
        return [(Example(tuple(task.encode_input(text)), (0,)), 0) for text in texts]

    names = [config["layer"].format(block) for block in config["blocks"]]
    read = {
        "keys": inputs(task, names, located),
        "phrasings": inputs(task, names, phrasings),
        "near": inputs(task, names, encoded(near), all_tokens=True),
        "text": inputs(task, names, encoded(other[: config["passages"]]), all_tokens=True),
        "ordinary": inputs(task, names, encoded(ordinary[: 3 * config["passages"]]), all_tokens=True),
    }
    results = []
    for name in names:
        row = look_up(
            read["keys"][name], torch.tensor(owner), read["phrasings"][name], torch.tensor(of_subject),
            read["near"][name], torch.cat(read["text"][name]), torch.cat(read["ordinary"][name]), config["recalls"],
        )  # fmt: skip
        results.append({"layer": name, **row})
        print(results[-1], file=sys.stderr, flush=True)
    write(out, config, {"subjects": len(subjects), "phrasings": len(phrasings), "near": len(near), "results": results})


def main() -> None:
    """Run the benchmark."""
    parsed = parser(__doc__, "subject_keys").parse_args()
    run(start(parsed), parsed.out)


if __name__ == "__main__":
    main()
