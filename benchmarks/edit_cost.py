"""What one edit costs, beside one forward and backward pass of the same prompt and target through the model.

    python benchmarks/edit_cost.py [--config benchmarks/configs/edit_cost.json] [--out result.json]

Both are timed in turn on one thread, in CPU seconds of the process; the ratio is taken pair by pair and its median is
the result. The pass is what a fine-tuning step would begin with: gradients of every weight of the model.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import remend
from remend.evaluation.report import environment
from remend.storage import write_json
from remend.tasks.causal_lm import CausalLM

HERE = Path(__file__).parent


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of this process for one call."""
    began = time.process_time()
    action()
    return time.process_time() - began


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "edit_cost.json")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "edit_cost.json")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text())
    torch.set_num_threads(1)
    model, tokenizer = remend.load(config["model"], "cpu")
    editor = remend.Mend.from_pretrained(config["editor"])
    task = CausalLM(model, tokenizer)
    requests = random.Random(config["seed"]).sample(remend.read_source(config["data"]), config["requests"])

    def forward_and_backward(request: remend.EditRequest) -> None:
        task.loss(task.collate([task.tokenise(request.prompt, request.target)])).sum().backward()
        model.zero_grad()

    passes, edits = [], []
    for repeat in range(config["repeats"] + 1):
        for request in requests:
            one_pass = seconds(lambda request=request: forward_and_backward(request))
            one_edit = seconds(lambda request=request: editor.edit(model, tokenizer, [request]))
            if repeat:  # the first round warms up
                passes.append(one_pass)
                edits.append(one_edit)
    ratios = [edit / one for edit, one in zip(edits, passes, strict=True)]
    result = {
        "config": config,
        "pass_ms": 1000 * statistics.median(passes),
        "edit_ms": 1000 * statistics.median(edits),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "n": len(ratios),
        "environment": environment(task.device),
    }
    print(json.dumps(result, indent=2))
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
