"""The time of one edit, relative to a forward and backward pass of the same prompt and target.

    python benchmarks/edit_cost.py [--config benchmarks/configs/edit_cost.json] [--out result.json]

Both are timed alternately on one thread, in CPU seconds of the process; the result is the median of the ratios. The
pass computes the gradients of all weights, as a step of fine-tuning does.
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


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    arguments = common.parser(__doc__, "edit_cost").parse_args(argv)
    config = common.start(arguments)
    task = remend.load(config["model"], "cpu")
    editor = remend.Mend.load(config["editor"])
    requests = random.Random(config["seed"]).sample(remend.read_source(config["data"]), config["requests"])

    def forward_and_backward(request: remend.EditRequest) -> None:
        task.loss(task.collate([task.encode(request.prompt, request.target)])).sum().backward()
        task.model.zero_grad()

    pass_times, edit_times = [], []
    for repeat in range(config["repeats"] + 1):
        for request in requests:
            pass_time = common.seconds(lambda request=request: forward_and_backward(request))
            edit_time = common.seconds(lambda request=request: editor.edit(task, [request]))
            if repeat:  # the first round warms up
                pass_times.append(pass_time)
                edit_times.append(edit_time)
    ratios = [edit / base for edit, base in zip(edit_times, pass_times, strict=True)]
    result = {
        "pass_ms": 1000 * statistics.median(pass_times),
        "edit_ms": 1000 * statistics.median(edit_times),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "n": len(ratios),
    }
    print(json.dumps(result, indent=2))
    common.write(arguments.out, config, result)


if __name__ == "__main__":
    main()
