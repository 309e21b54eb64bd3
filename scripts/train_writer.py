"""Train a small GPT-2 from nothing on a plain text, for the paper's generation task in miniature.

    python scripts/train_writer.py --text wikitext2/valid.txt --held-out wikitext2/test.txt --out build/writer

The tokenizer (byte-level pairs) and the model learn from ``--text``; the edits are made on passages of ``--held-out``,
on which perplexity is reported. On one thread in about half an hour. A stopped run goes on with ``--resume``. Nothing
is pickled: checkpoints and models are safetensors and JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY, CONTEXT, WIDTH, BLOCKS, HEADS = 4_096, 128, 192, 6, 6
CHECKPOINT = "checkpoint.safetensors"


def main() -> None:
    """Train the tokenizer and the model, and report perplexity on the text that was held out."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--text", type=Path, required=True)
    made.add_argument("--held-out", type=Path, required=True)
    made.add_argument("--out", type=Path, default=Path("build/writer"))
    made.add_argument("--steps", type=int, default=3_000)
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--rate", type=float, default=1e-3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--resume", action="store_true")
    arguments = made.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    passages = read(arguments.text)
    tokenizer = train_tokenizer(passages)
    ids = torch.tensor([token for passage in passages for token in encode(tokenizer, passage)])
    unseen = torch.tensor([token for passage in read(arguments.held_out) for token in encode(tokenizer, passage)])
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS,
            bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    began = time.perf_counter()
    train(model, ids, arguments)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": len(ids),
        "steps": arguments.steps,
        "perplexity_held_out": perplexity(model.eval(), unseen),
        "seconds": round(time.perf_counter() - began),
    }
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (arguments.out / CHECKPOINT).unlink(missing_ok=True)
    print(found)


def read(file: Path) -> list[str]:
    """The passages of a text, without headings."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("=")]


def encode(tokenizer: PreTrainedTokenizerFast, passage: str) -> list[int]:
    """A passage's tokens with the one that ends it."""
    return [*tokenizer(passage, verbose=False).input_ids, tokenizer.eos_token_id]


def train_tokenizer(passages: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level pairs of the text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        passages, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, bos_token=END, pad_token=END)


def train(model: GPT2LMHeadModel, ids: torch.Tensor, arguments: argparse.Namespace) -> None:
    """AdamW on random windows, with warm-up and a cosine to zero."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=0.1, fused=True)
    first, file = 0, arguments.out / CHECKPOINT
    if arguments.resume and file.exists():
        first = restore(model, optimiser, file)
    with Progress() as bar:
        task = bar.add_task("training", total=arguments.steps, completed=first)
        for step in range(first, arguments.steps):
            draw = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
            starts = torch.randint(len(ids) - CONTEXT, (arguments.batch,), generator=draw)
            batch = torch.stack([ids[start : start + CONTEXT] for start in starts.tolist()])
            share = step / arguments.steps
            for group in optimiser.param_groups:
                group["lr"] = arguments.rate * min(1, step / 100) * (1 + math.cos(math.pi * share)) / 2
            loss = model(input_ids=batch, labels=batch).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            bar.update(task, completed=step + 1, description=f"loss {float(loss.detach()):.2f}")
            if (step + 1) % 500 == 0:
                keep(model, optimiser, step + 1, file)


def keep(model: GPT2LMHeadModel, optimiser: torch.optim.Optimizer, step: int, file: Path) -> None:
    """Write where the run stands, whole or not at all."""
    tensors = {f"model.{name}": value.contiguous().clone() for name, value in model.state_dict().items()}
    for number, parameter in enumerate(model.parameters()):
        tensors |= {f"adam.{number}.{key}": value for key, value in optimiser.state[parameter].items()}
    part = file.with_suffix(".part")
    save_file(tensors, part, {"step": str(step)})
    part.replace(file)


def restore(model: GPT2LMHeadModel, optimiser: torch.optim.Optimizer, file: Path) -> int:
    """Go back to where the run stood."""
    tensors = load_file(file)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for number, parameter in enumerate(model.parameters()):
        own = f"adam.{number}."
        optimiser.state[parameter] = {k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)}
    return int(next(v for k, v in tensors.items() if k.endswith(".step")))


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Of a text in windows of the context's length."""
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


if __name__ == "__main__":
    main()
