"""Figures 3 and 4: the memory of training an editor, against the size of the model; each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remend.errors import TrainingError
from remend.serialization import write_json

METHODS = ("ke", "enn", "mend")
BLOCKS = 8

PROGRAM = """
import dataclasses, json, pathlib, resource, sys, warnings
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from remend.editors import TRAINED
from remend.request import EditRequest, Probe
from remend.training import PRESETS, train

method, width = sys.argv[1], int(sys.argv[2])
warnings.simplefilter("ignore")
torch.set_num_threads(1)
words = {f"w{number}": number for number in range(4000)} | {"<end>": 4000}
raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
config = GPT2Config(
    vocab_size=4001, n_positions=64, n_embd=width, n_layer=8, n_head=max(1, width // 64),
    bos_token_id=4000, eos_token_id=4000,
)
model = GPT2LMHeadModel(config).eval()
parameters = sum(p.numel() for p in model.parameters())

def text(*numbers):
    return " ".join(f"w{number % 4000}" for number in numbers)

requests = [
    EditRequest(
        prompt=text(*range(i, i + 24)), target=text(i + 40, i + 41), subject=f"s{i}",
        paraphrases=(text(*range(i + 1, i + 24)), text(*range(i + 2, i + 24))),
        locality=(Probe(prompt=text(*range(i + 100, i + 124)), target=text(i + 60)),),
    )
    for i in range(0, 1200, 60)
]
try:  # what the process holds now: starting it may have taken more for a moment
    status = pathlib.Path("/proc/self/status").read_text()
    before = int(status.split("VmRSS:")[1].split()[0])
except (OSError, IndexError):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
settings = dataclasses.replace(PRESETS["paper"][1], max_steps=2, validate_every=2, validation_size=2)
editor = TRAINED[method].for_model(model)
train(model, tokenizer, requests[:16], requests[16:], config=settings, editor=editor)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"parameters": parameters, "before": before, "peak": peak}))
"""


def measure(folder: Path, widths: Sequence[int]) -> list[dict[str, Any]]:
    """Peak memory (GB of the process) of two training steps with batches of ten, for each method and model.

    Raises:
        TrainingError: a process failed.
    """
    found = []
    for width in widths:
        for method in METHODS:
            file = folder / "memory" / f"{method}-{width}.json"
            if not file.exists():
                write_json(file, _measured(method, width))
            found.append({"method": method, "width": width, **json.loads(file.read_text(encoding="utf-8"))})
    return found


def _measured(method: str, width: int) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, method, str(width)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        said = run.stderr.strip().splitlines() or [
            f"it ended with {run.returncode}"
        ]  # one that was killed says nothing
        raise TrainingError(f"measuring the memory of {method} failed: {said[-1]}")
    raw = json.loads(run.stdout.strip().splitlines()[-1])
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    gigabytes = {key: raw[key] * scale / 1e9 for key in ("before", "peak")}
    return {"parameters": raw["parameters"], **gigabytes, "added": gigabytes["peak"] - gigabytes["before"]}
