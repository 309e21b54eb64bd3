"""Train a small model from scratch until it knows given facts: the training loop, checkpoints and report.

``statement_trainer.py`` (a GPT-2), ``question_trainer.py`` (a T5) and ``claim_trainer.py`` (a BERT) add a
:class:`FactTrainer` each. All facts of all splits are learnt in all their phrasings; the splits are for the editors.
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

from remend.data.fact_requests import Fact, FactSet

CHECKPOINT = "checkpoint.safetensors"

console = Console(width=110)


class FactTrainer(ABC):
    """A model that is to know facts, with its training examples and its test.

    Args:
        fact_set: the facts.
        args: the command line's settings (:func:`parser`).
    """

    model_class: type[PreTrainedModel]
    measure = "exact match"
    min_accuracy = 0.97
    """The share of all questions that the finished model must answer rightly."""

    def __init__(self, fact_set: FactSet, args: argparse.Namespace) -> None:
        self.fact_set = fact_set
        self.args = args
        facts = list(fact_set.facts)
        self.facts = facts if args.facts is None else random.Random(0).sample(facts, args.facts)
        self.tokenizer = self.train_tokenizer()
        self.model = self.build().to(args.device)

    @abstractmethod
    def train_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer fitted to the facts."""

    @abstractmethod
    def build(self) -> Any:
        """Return a fresh model, without dropout, since it is to memorize."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """Return the blocks of the model, whose matrices Muon trains."""

    @abstractmethod
    def examples(self, rng: random.Random) -> list[Any]:
        """Return the examples of one epoch, in any order, drawn from ``rng`` alone, so that runs can be resumed."""

    @abstractmethod
    def length(self, example: Any) -> int:
        """Return the length by which examples are sorted into batches."""

    @abstractmethod
    def losses(self, batch: list[Any]) -> tuple[Tensor, Tensor]:
        """Return the loss to minimize and the one to show."""

    @abstractmethod
    def check(self, model: Any, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[tuple[str, bool]]:
        """Return the relation of each question about some facts, and whether the model answers it rightly."""

    def phrasings(self, fact: Fact) -> tuple[str, ...]:
        """Return all phrasings of a fact's relation; some are held out from editors, but not from the model."""
        return self.fact_set.relations[fact.relation].all_phrasings

    def epoch(self, number: int) -> list[list[Any]]:
        """Return the batches of one epoch, which depend on the seed and its number alone, so that runs can be resumed.

        Batches hold examples of about the same length, which spares most of the padding.
        """
        rng = random.Random(f"{self.args.seed}/{number}")
        examples = self.examples(rng)
        rng.shuffle(examples)
        window = 24 * self.args.batch
        batches = []
        for start in range(0, len(examples), window):
            window_examples = sorted(examples[start : start + window], key=self.length)
            batches += [
                window_examples[first : first + self.args.batch]
                for first in range(0, len(window_examples), self.args.batch)
            ]
        rng.shuffle(batches)
        return batches


def parser(description: str | None, out: Path, report: Path, checkpoint: Path) -> argparse.ArgumentParser:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--report", type=Path, default=report)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--facts", type=int, help="learn only so many facts, for a trial")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="stop after so many seconds")
    parser.add_argument("--phrasings", type=int, default=3, help="phrasings of each fact in an epoch")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--muon-lr", type=float, default=0.01, help="learning rate of the matrices of the blocks")
    parser.add_argument("--muon-steps", type=int, default=4, help="Newton-Schulz steps")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of everything else")
    parser.add_argument("--every", type=int, default=200, help="steps between checks on a sample")
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints")
    return parser


def train_on_facts(trainer_class: type[FactTrainer], facts: FactSet, args: argparse.Namespace) -> None:
    """Train a model on facts, save it, and check that the saved model knows them."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    trainer = trainer_class(facts, args)
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    console.print(f"{len(trainer.facts)} facts, {size:,} parameters")
    seconds, steps = train(trainer)
    save(trainer.model, trainer.tokenizer, args.out)
    reloaded: Any = trainer_class.model_class.from_pretrained(args.out, dtype=torch.float32)
    reloaded.to(args.device)
    results = trainer.check(reloaded, AutoTokenizer.from_pretrained(args.out), trainer.facts)
    overall = report(trainer, results, size, seconds, steps)
    if overall < trainer_class.min_accuracy:
        raise SystemExit(
            f"{trainer_class.measure} is {overall:.2%}, at least {trainer_class.min_accuracy:.0%} is needed: train for "
            "more epochs"
        )


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


def make_optimizers(trainer: FactTrainer) -> tuple[Optimizer, Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the rest.

    With AdamW alone the same accuracy takes several times as many steps.
    """
    args = trainer.args
    matrices = [p for block in trainer.blocks() for p in block.parameters() if p.ndim == 2]
    ids = set(map(id, matrices))
    rest = [parameter for parameter in trainer.model.parameters() if id(parameter) not in ids]
    return (
        torch.optim.Muon(
            matrices, lr=args.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=args.muon_steps
        ),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    )


def train(trainer: FactTrainer) -> tuple[float, int]:
    """Train to the end of the last epoch or of the budget; return the seconds, earlier runs included, and the steps."""
    model, args = trainer.model, trainer.args
    optimizers = make_optimizers(trainer)
    total = args.epochs * len(trainer.epoch(0))
    step, spent = load_checkpoint(model, optimizers, args.checkpoint) if args.resume else (0, 0.0)
    start = last_save = time.monotonic()
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=total, completed=step, loss=math.nan)
        for batch in remaining_batches(trainer, step):
            progress_share = max(step / total, (time.monotonic() - start + spent) / args.budget_seconds)
            if progress_share >= 1:
                break
            torch.manual_seed(args.seed + step)  # a resumed run draws what an uninterrupted one draws
            loss = update(trainer, optimizers, schedule(progress_share), batch)
            step += 1
            progress.update(task, advance=1, loss=loss)
            now = time.monotonic()
            if step % args.every == 0:
                sample = random.Random(step).sample(trainer.facts, min(100, len(trainer.facts)))
                accuracy = mean(hit for _, hit in trainer.check(model, trainer.tokenizer, sample))
                console.print(f"step {step}/{total}  {now - start + spent:.0f} s  loss {loss:.4f}  {accuracy:.2%}")
            if now - last_save > args.save_every:
                save_checkpoint(model, optimizers, step, now - start + spent, args.checkpoint)
                last_save = now
    return spent + time.monotonic() - start, step


def update(trainer: FactTrainer, optimizers: tuple[Optimizer, ...], factor: float, batch: list[Any]) -> float:
    """Take one step at a fraction of the full learning rates and return the loss to show."""
    loss, reported_loss = trainer.losses(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()
    return reported_loss.item()


def remaining_batches(trainer: FactTrainer, step: int) -> Iterator[list[Any]]:
    """Yield the batches of all epochs after the first ``step``."""
    for number in range(trainer.args.epochs):
        batches = trainer.epoch(number)
        yield from batches[step:]
        step = max(0, step - len(batches))


def schedule(progress: float, warmup: float = 0.03) -> float:
    """Return the current fraction of the learning rate: a short linear warm-up, then a cosine down to zero."""
    if progress < warmup:
        return (progress + 1e-4) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


def mean(hits: Iterable[bool]) -> float:
    """Return the share that is true."""
    values = list(hits)
    return sum(values) / len(values)


def save_checkpoint(
    model: PreTrainedModel, optimizers: tuple[Optimizer, ...], step: int, seconds: float, folder: Path
) -> None:
    """Write the weights, the optimizers' states and the counters to one file, which is replaced as a whole."""
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            state = optimizer.state.get(parameter, {})
            tensors |= {f"{key}/{name}": tensor.contiguous() for key, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "new.safetensors"
    save_file(tensors, new, metadata={"progress": json.dumps({"step": step, "seconds": seconds})})
    new.replace(folder / CHECKPOINT)


def load_checkpoint(model: PreTrainedModel, optimizers: tuple[Optimizer, ...], folder: Path) -> tuple[int, float]:
    """Read what :func:`save_checkpoint` wrote and return the steps done and the seconds spent."""
    with safe_open(folder / CHECKPOINT, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    optimizer_of = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = dict(model.named_parameters())
    for entry, tensor in load_file(folder / CHECKPOINT).items():
        key, name = entry.split("/")
        parameter = parameters[name]
        if key == "weight":
            parameter.data.copy_(tensor)
        else:
            optimizer_of[parameter].state[parameter][key] = tensor.to(parameter.device)
    return progress["step"], progress["seconds"]


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model in half precision, marked to be loaded in single precision, and its tokenizer."""
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def report(trainer: FactTrainer, results: list[tuple[str, bool]], size: int, seconds: float, steps: int) -> float:
    """Print and write the share of questions that are answered rightly, by relation and in all; return the latter."""
    args, measure = trainer.args, trainer.measure
    by_relation = defaultdict(list)
    for identifier, hit in results:
        by_relation[identifier].append(hit)
    table = Table("relation", "name", "questions", measure)
    for identifier, relation in trainer.fact_set.relations.items():
        if hits := by_relation.get(identifier):
            table.add_row(identifier, relation.name, str(len(hits)), f"{mean(hits):.2%}")
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
