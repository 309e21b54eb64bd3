"""What the values that ``fit`` finds cost and do: time, phrasings that follow, and how far other statements move.

    make real && python benchmarks/real_requests.py build/real/smollm2
    python benchmarks/value_search.py

Measures finer than the shares of benchmarks/real.py, for choosing between settings on validation requests. Of an
edit of one pair, means over requests of:

- ``seconds``: CPU seconds;
- ``surprise``, ``chosen``: −log p of the target, in nats a token and at most :data:`MOST`, after phrasings that the
  editor was not given, and the share of these at which all its tokens are the model's choice;
- ``kept``, ``others``: of common statements about the subject to which the unedited model has an answer
  (:data:`SURE`) and which ask something else, those that the editor was given to keep and all others: the divergence
  of the next token, KL(unedited ‖ edited), and the share whose most probable token stays.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import remend
from common import HERE, parser, start, write
from real import Row, interval, make_editor, passages
from remend.core.low_rank_hooks import frozen
from remend.data.request_files import read_requests
from remend.editors.locate_then_edit.common_questions import frames, next_tokens
from remend.editors.locate_then_edit.fit import Fit
from remend.request import EditRequest
from remend.tasks.base import Task

MOST = 8.0
"""The largest −log p that counts: one phrasing that is far from its target would outweigh all others."""

SURE = 0.2
"""The least probability of the answer that the model has."""

PHRASINGS = 12
"""Phrasings of a request that are scored, at most."""


def measure(task: Task, editor: Fit, request: EditRequest) -> Row:
    """Return what the edit of a request's pair costs and does."""
    bare = EditRequest(prompt=request.prompt, target=request.target, subject=request.subject, id=request.id)
    (contexts,) = editor.encode(task, [bare])
    given, kept = ({tuple(e.input) for e, _ in texts} for texts in (contexts.examples, contexts.kept))
    phrasings = [*request.paraphrases, *request.unseen_paraphrases]
    phrasings = [text for text in phrasings if tuple(task.encode_input(text)) not in given][:PHRASINGS]
    subject = str(request.subject)
    asked = [f.about(subject) for f in frames("statements") if f.question not in contexts.near]
    asked = sorted(text for text in set(asked) if tuple(task.encode_input(text)) not in given)
    before = next_tokens(task, asked)
    sure = (before.amax(1) >= SURE).nonzero().flatten().tolist()
    began = time.process_time()
    edit = editor.edit(task, [bare])
    row: Row = {"seconds": time.process_time() - began}
    with edit.applied(task.model):
        after = next_tokens(task, [asked[index] for index in sure])
        if phrasings:
            surprise, chosen = after_phrasings(task, phrasings, request.target)
            row |= {"surprise": float(surprise.clamp(max=MOST).mean()), "chosen": float(chosen.float().mean())}
    was = before[sure]
    divergence = (was * (was.clamp(min=1e-9).log() - after.clamp(min=1e-9).log())).sum(1)
    stays = (was.argmax(1) == after.argmax(1)).float()
    of_kept = torch.tensor([tuple(task.encode_input(asked[index])) in kept for index in sure], dtype=torch.bool)
    for name, which in (("kept", of_kept), ("others", ~of_kept)):
        if which.any():
            row |= {f"{name}_divergence": float(divergence[which].mean()), f"{name}_stay": float(stays[which].mean())}
    return row


def after_phrasings(task: Task, phrasings: Sequence[Any], target: str) -> tuple[Tensor, Tensor]:
    """Return −log p(target) a token after each phrasing, and whether all its tokens are the model's choice."""
    examples = [task.encode(text, target) for text in phrasings]
    batch = task.collate(examples)
    with torch.no_grad(), frozen(task.model):
        outputs = task.outputs(batch)
    losses = task.distribution.loss(outputs, batch.target, batch.row, len(examples))
    wrong = batch.row[~task.distribution.correct(outputs, batch.target)].bincount(minlength=len(examples))
    return losses.detach(), wrong == 0


def run(config: Mapping[str, Any], out: Path) -> None:
    """Measure the variants on every ``every``-th request."""
    task = remend.load(str(HERE.parent / config["model"]))
    requests = read_requests(HERE.parent / config["requests"].format(split=config["split"]))
    requests = requests[:: config["every"]][: config["count"]]
    text, _ = passages(config)
    results = []
    for variant in config["variants"]:
        editor = make_editor(task, variant, text)
        assert isinstance(editor, Fit)
        rows = []
        for request in requests:
            rows.append(measure(task, editor, request))
            print(json.dumps([variant["name"], str(request.id), rows[-1]]), file=sys.stderr, flush=True)
        names = dict.fromkeys(name for row in rows for name in row)
        means = {name: interval([row[name] for row in rows if name in row]) for name in names}
        results.append({"variant": variant, **means})
        write(out, config, {"requests": len(requests), "results": results})


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__, "value_search")
    parsed = arguments.parse_args()
    run(start(parsed), parsed.out)


if __name__ == "__main__":
    main()
