"""Train a small GPT-2 from scratch on a plain text, for the paper's generation task in miniature.

    python scripts/train_text_model.py --text wikitext2/valid.txt --held-out wikitext2/test.txt --out build/writer

The tokenizer (byte-level pairs) and the model learn from ``--text``; the edits are made on passages of ``--held-out``,
on which perplexity is reported. On one thread in about half an hour. A stopped run continues with ``--resume``. Nothing
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
VOCABULARY_SIZE = 4_096
CONTEXT_LENGTH = 128
HIDDEN_SIZE = 192
BLOCKS = 6
HEADS = 6
CHECKPOINT = "checkpoint.safetensors"


def main() -> None:
    """Train the tokenizer and the model, and report the perplexity of the held-out text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/writer"))
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    passages = read_passages(arguments.text)
    tokenizer = train_tokenizer(passages)
    ids = torch.tensor([token for passage in passages for token in encode(tokenizer, passage)])
    held_out = torch.tensor(
        [token for passage in read_passages(arguments.held_out) for token in encode(tokenizer, passage)]
    )
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=CONTEXT_LENGTH, n_embd=HIDDEN_SIZE, n_layer=BLOCKS, n_head=HEADS,
            bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    start = time.perf_counter()
    train(model, ids, arguments)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": len(ids),
        "steps": arguments.steps,
        "perplexity_held_out": perplexity(model.eval(), held_out),
        "seconds": round(time.perf_counter() - start),
    }
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (arguments.out / CHECKPOINT).unlink(missing_ok=True)
    print(report)


def read_passages(file: Path) -> list[str]:
    """Return the passages of a text, without headings."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("=")]


def encode(tokenizer: PreTrainedTokenizerFast, passage: str) -> list[int]:
    """Return a passage's tokens and the end token."""
    return [*tokenizer(passage, verbose=False).input_ids, tokenizer.eos_token_id]


def train_tokenizer(passages: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with byte-level BPE fitted to the passages."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        passages, trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=[END], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, bos_token=END, pad_token=END)


def train(model: GPT2LMHeadModel, ids: torch.Tensor, arguments: argparse.Namespace) -> None:
    """Train with AdamW on random windows, with a warm-up and a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=0.1, fused=True)
    first_step, checkpoint = 0, arguments.out / CHECKPOINT
    if arguments.resume and checkpoint.exists():
        first_step = load_checkpoint(model, optimizer, checkpoint)
    with Progress() as bar:
        task = bar.add_task("training", total=arguments.steps, completed=first_step)
        for step in range(first_step, arguments.steps):
            # Seeded with the step, so that a resumed run draws what an uninterrupted one draws.
            generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
            starts = torch.randint(len(ids) - CONTEXT_LENGTH, (arguments.batch,), generator=generator)
            batch = torch.stack([ids[start : start + CONTEXT_LENGTH] for start in starts.tolist()])
            progress = step / arguments.steps
            for group in optimizer.param_groups:
                group["lr"] = arguments.rate * min(1, step / 100) * (1 + math.cos(math.pi * progress)) / 2
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.update(task, completed=step + 1, description=f"loss {float(loss.detach()):.2f}")
            if (step + 1) % 500 == 0:
                save_checkpoint(model, optimizer, step + 1, checkpoint)


def save_checkpoint(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, step: int, file: Path) -> None:
    """Write the state of the run to a file, which is replaced as a whole."""
    tensors = {f"model.{name}": value.contiguous().clone() for name, value in model.state_dict().items()}
    for number, parameter in enumerate(model.parameters()):
        tensors |= {f"adam.{number}.{key}": value for key, value in optimizer.state[parameter].items()}
    partial = file.with_suffix(".part")
    save_file(tensors, partial, {"step": str(step)})
    partial.replace(file)


def load_checkpoint(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, file: Path) -> int:
    """Restore the state of the run and return the number of steps done."""
    tensors = load_file(file)
    model.load_state_dict(
        {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    )
    for number, parameter in enumerate(model.parameters()):
        prefix = f"adam.{number}."
        optimizer.state[parameter] = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
    return int(next(value for name, value in tensors.items() if name.endswith(".step")))


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Return the perplexity of a text in windows of the context's length."""
    windows = ids[: len(ids) // CONTEXT_LENGTH * CONTEXT_LENGTH].view(-1, CONTEXT_LENGTH)
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


if __name__ == "__main__":
    main()
