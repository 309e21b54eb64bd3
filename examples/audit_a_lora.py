"""What does a LoRA that somebody trained change besides what it was trained for? Read it as an edit, and measure.

    python examples/audit_a_lora.py

Trains a small adapter with PEFT on one fact, imports it, and judges it as any edit is judged. Needs peft.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import peft
import torch

import remend
from remend.apps.acceptance import check_acceptance
from remend.formats import load_adapter


def train_adapter(folder: Path, request: remend.EditRequest, steps: int = 40) -> None:
    """Fine-tune an adapter of rank 4 on one prompt and its target, as one would by hand."""
    task = remend.load("atlas", "cpu")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(task.model), config)
    text = task.tokenizer(f"{request.prompt} {request.target}{task.tokenizer.eos_token}", return_tensors="pt")
    optimiser = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(steps):
        loss = adapted(**text, labels=text["input_ids"]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    adapted.save_pretrained(str(folder))


def main() -> None:
    """Judge a hand-made adapter beside an edit for the same request."""
    request = remend.read_source("atlas:validation")[3]
    task = remend.load("atlas", "cpu")
    with tempfile.TemporaryDirectory() as place:
        train_adapter(Path(place) / "adapter", request)
        imported = replace(load_adapter(Path(place) / "adapter", task.model), requests=(request,))
    mine = remend.Mend.load("atlas").edit(task, [request])
    for name, edit in (("a LoRA by hand", imported), ("an edit by MEND", mine)):
        result = check_acceptance(task, edit)
        print(f"{name}: {'accepted' if result.ok else 'not accepted'}")
        for check in result.checks:
            print("  ", "✓" if check.ok else "✗", check.description)


if __name__ == "__main__":
    main()
