"""What one edit costs, beside one forward and backward pass of the same prompt and target through the model.

    python benchmarks/edit_cost.py [--config benchmarks/configs/edit_cost.json] [--out result.json]

Both are timed in turn on one thread, in CPU seconds of the process; the ratio is taken pair by pair and its median is
the result. The pass is what a fine-tuning step would begin with: gradients of every weight of the model.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import json
import random
import statistics
from collections.abc import Sequence

import common
import remend
from remend.tasks.causal_lm import CausalLM


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    arguments = common.parser(__doc__, "edit_cost").parse_args(argv)
    config = common.start(arguments)
    task = remend.load(config["model"], "cpu")
    editor = remend.Mend.from_pretrained(config["editor"])
    task = CausalLM(task.model, task.tokenizer)
    requests = random.Random(config["seed"]).sample(remend.read_source(config["data"]), config["requests"])

    def forward_and_backward(request: remend.EditRequest) -> None:
        task.loss(task.collate([task.encode(request.prompt, request.target)])).sum().backward()
        task.model.zero_grad()

    passes, edits = [], []
    for repeat in range(config["repeats"] + 1):
        for request in requests:
            one_pass = common.seconds(lambda request=request: forward_and_backward(request))
            one_edit = common.seconds(lambda request=request: editor.edit(task, [request]))
            if repeat:  # the first round warms up
                passes.append(one_pass)
                edits.append(one_edit)
    ratios = [edit / one for edit, one in zip(edits, passes, strict=True)]
    result = {
        "pass_ms": 1000 * statistics.median(passes),
        "edit_ms": 1000 * statistics.median(edits),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "n": len(ratios),
    }
    print(json.dumps(result, indent=2))
    common.write(arguments.out, config, result)


if __name__ == "__main__":
    main()
