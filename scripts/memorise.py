"""Train a small model from nothing until it knows given facts: what is the same whatever the facts are asked as.

``statements.py`` (a GPT-2), ``questions.py`` (a T5) and ``claims.py`` (a BERT) say what is different, as a
:class:`Memoriser` each. All facts of all splits are learnt in all their phrasings; the splits are for the editors.
Nothing is pickled: checkpoints and models are safetensors and JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from remend.data.facts import Fact, FactSet

CHECKPOINT = "checkpoint.safetensors"

console = Console(width=110)


class Memoriser(ABC):
    """A model that is to know facts, and how it is asked.

    Args:
        known: the facts.
        args: the command line's settings (:func:`parser`).
    """

    model_class: type[PreTrainedModel]
    measure = "exact match"
    least = 0.97
    """The least part of all questions that the finished model must answer rightly."""

    def __init__(self, known: FactSet, args: argparse.Namespace) -> None:
        self.known = known
        self.args = args
        facts = list(known.facts)
        self.facts = facts if args.facts is None else random.Random(0).sample(facts, args.facts)
        self.tokenizer = self.train_tokenizer()
        self.model = self.build().to(args.device)

    @abstractmethod
    def train_tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer fitted to the facts."""

    @abstractmethod
    def build(self) -> Any:
        """A fresh model; without dropout, since memorising is the point."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """The blocks of the model, whose matrices Muon trains."""

    @abstractmethod
    def examples(self, rng: random.Random) -> list[Any]:
        """What is learnt in one epoch, in any order; the draws are from ``rng`` alone, so that runs resume."""

    @abstractmethod
    def length(self, example: Any) -> int:
        """By what examples are sorted into batches."""

    @abstractmethod
    def losses(self, batch: list[Any]) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the one to show."""

    @abstractmethod
    def check(self, model: Any, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[tuple[str, bool]]:
        """The relation of each question about some facts, and whether the model answers it rightly."""

    def phrasings(self, fact: Fact) -> tuple[str, ...]:
        """All phrasings of a fact's relation: what is held out is held out from editors, not from the model."""
        return self.known.relations[fact.relation].all_phrasings

    def epoch(self, number: int) -> list[list[Any]]:
        """The batches of one epoch, a function of the seed and the epoch's number alone, so that runs resume.

        Batches hold examples of about the same length, which spares most of the padding.
        """
        rng = random.Random(f"{self.args.seed}/{number}")
        examples = self.examples(rng)
        rng.shuffle(examples)
        window = 24 * self.args.batch
        batches = []
        for start in range(0, len(examples), window):
            near = sorted(examples[start : start + window], key=self.length)
            batches += [near[at : at + self.args.batch] for at in range(0, len(near), self.args.batch)]
        rng.shuffle(batches)
        return batches


def parser(description: str | None, out: Path, report: Path, checkpoint: Path) -> argparse.ArgumentParser:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--report", type=Path, default=report)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--facts", type=int, help="learn only so many facts, for a trial")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="end after so many seconds")
    parser.add_argument("--phrasings", type=int, default=3, help="phrasings of each fact in an epoch")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--muon-lr", type=float, default=0.01, help="learning rate of the matrices of the blocks")
    parser.add_argument("--muon-steps", type=int, default=4, help="Newton-Schulz steps")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of everything else")
    parser.add_argument("--every", type=int, default=200, help="steps between checks on a sample")
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints")
    return parser


def memorise(kind: type[Memoriser], known: FactSet, args: argparse.Namespace) -> None:
    """Train, save, reload and check."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    memoriser = kind(known, args)
    size = sum(parameter.numel() for parameter in memoriser.model.parameters())
    console.print(f"{len(memoriser.facts)} facts, {size:,} parameters")
    seconds, steps = train(memoriser)
    save(memoriser.model, memoriser.tokenizer, args.out)
    reloaded: Any = kind.model_class.from_pretrained(args.out, dtype=torch.float32)
    reloaded.to(args.device)
    results = memoriser.check(reloaded, AutoTokenizer.from_pretrained(args.out), memoriser.facts)
    overall = report(memoriser, results, size, seconds, steps)
    if overall < kind.least:
        raise SystemExit(f"{kind.measure} is {overall:.2%}, at least {kind.least:.0%} is needed: train for more epochs")


def byte_level_bpe(texts: Iterable[str], vocabulary: int, special: Sequence[str], prefix_space: bool) -> Tokenizer:
    """Return byte-level BPE fitted to texts, with spaces at the front of tokens as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def padded(rows: Sequence[Sequence[int]], pad: int, device: str | torch.device) -> Tensor:
    """Return rows of tokens as one tensor, padded on the right."""
    length = max(map(len, rows))
    return torch.tensor([(*row, *[pad] * (length - len(row))) for row in rows], device=device)


def optimizers(memoriser: Memoriser) -> tuple[Optimizer, Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the rest.

    With AdamW alone the same accuracy takes several times as many steps.
    """
    args = memoriser.args
    matrices = [p for block in memoriser.blocks() for p in block.parameters() if p.ndim == 2]
    ids = set(map(id, matrices))
    others = [parameter for parameter in memoriser.model.parameters() if id(parameter) not in ids]
    return (
        torch.optim.Muon(
            matrices, lr=args.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=args.muon_steps
        ),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    )


def train(memoriser: Memoriser) -> tuple[float, int]:
    """Train to the end of the last epoch or of the budget; return the seconds, earlier runs included, and the steps."""
    model, args = memoriser.model, memoriser.args
    both = optimizers(memoriser)
    total = args.epochs * len(memoriser.epoch(0))
    step, spent = load_checkpoint(model, both, args.checkpoint) if args.resume else (0, 0.0)
    started = saved = time.monotonic()
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=total, completed=step, loss=math.nan)
        for batch in remaining(memoriser, step):
            share = max(step / total, (time.monotonic() - started + spent) / args.budget_seconds)
            if share >= 1:
                break
            torch.manual_seed(args.seed + step)  # a resumed run draws what an uninterrupted one draws
            loss = update(memoriser, both, schedule(share), batch)
            step += 1
            progress.update(task, advance=1, loss=loss)
            now = time.monotonic()
            if step % args.every == 0:
                sample = random.Random(step).sample(memoriser.facts, min(100, len(memoriser.facts)))
                right = mean(hit for _, hit in memoriser.check(model, memoriser.tokenizer, sample))
                console.print(f"step {step}/{total}  {now - started + spent:.0f} s  loss {loss:.4f}  {right:.2%}")
            if now - saved > args.save_every:
                save_checkpoint(model, both, step, now - started + spent, args.checkpoint)
                saved = now
    return spent + time.monotonic() - started, step


def update(memoriser: Memoriser, both: tuple[Optimizer, ...], factor: float, batch: list[Any]) -> float:
    """Take one step at a part of the full learning rates and return the loss to show."""
    minimised, shown = memoriser.losses(batch)
    minimised.backward()
    torch.nn.utils.clip_grad_norm_(memoriser.model.parameters(), 1.0)
    for optimizer in both:
        for group in optimizer.param_groups:
            group["lr"] = factor * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()
    return shown.item()


def remaining(memoriser: Memoriser, step: int) -> Iterator[list[Any]]:
    """Yield the batches of all epochs after the first ``step``."""
    for number in range(memoriser.args.epochs):
        batches = memoriser.epoch(number)
        yield from batches[step:]
        step = max(0, step - len(batches))


def schedule(progress: float, warmup: float = 0.03) -> float:
    """Return the part of the learning rate in force: a short rise, then a cosine down to zero."""
    if progress < warmup:
        return (progress + 1e-4) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


def mean(hits: Iterable[bool]) -> float:
    """Return the part that is true."""
    found = list(hits)
    return sum(found) / len(found)


def save_checkpoint(
    model: PreTrainedModel, both: tuple[Optimizer, ...], step: int, seconds: float, folder: Path
) -> None:
    """Write the weights, what the optimizers remember and the counters, in one file so that they belong together."""
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for optimizer in both:
            memory = optimizer.state.get(parameter, {})
            tensors |= {f"{key}/{name}": tensor.contiguous() for key, tensor in memory.items()}
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "new.safetensors"
    save_file(tensors, new, metadata={"progress": json.dumps({"step": step, "seconds": seconds})})
    new.replace(folder / CHECKPOINT)


def load_checkpoint(model: PreTrainedModel, both: tuple[Optimizer, ...], folder: Path) -> tuple[int, float]:
    """Read what :func:`save_checkpoint` wrote and return the steps done and the seconds spent."""
    with safe_open(folder / CHECKPOINT, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    owners = {parameter: o for o in both for group in o.param_groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    for entry, tensor in load_file(folder / CHECKPOINT).items():
        key, name = entry.split("/")
        parameter = parameters[name]
        if key == "weight":
            parameter.data.copy_(tensor)
        else:
            owners[parameter].state[parameter][key] = tensor.to(parameter.device)
    return progress["step"], progress["seconds"]


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model in half precision, marked to be loaded in single precision, and its tokenizer."""
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def report(memoriser: Memoriser, results: list[tuple[str, bool]], size: int, seconds: float, steps: int) -> float:
    """Print and write how many questions are answered rightly, by relation and over all; return the latter."""
    args, measure = memoriser.args, memoriser.measure
    by_relation = defaultdict(list)
    for relation, hit in results:
        by_relation[relation].append(hit)
    table = Table("relation", "name", "questions", measure)
    for relation, described in memoriser.known.relations.items():
        if hits := by_relation.get(relation):
            table.add_row(relation, described.name, str(len(hits)), f"{mean(hits):.2%}")
    overall = mean(hit for _, hit in results)
    console.print(table)
    console.print(f"{measure} {overall:.3%} of {len(results)} questions, {steps} steps, {seconds:.0f} s")
    key = measure.replace(" ", "_")
    figures = {
        key: round(overall, 5),
        "questions": len(results),
        "parameters": size,
        "steps": steps,
        "seconds": round(seconds),
        "device": args.device,
        "threads": args.threads,
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "relations": {
            relation: {key: round(mean(hits), 5), "questions": len(hits)}
            for relation, hits in sorted(by_relation.items(), key=lambda item: int(item[0][1:]))
        },
    }
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return overall
