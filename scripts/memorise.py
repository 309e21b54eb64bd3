"""Train a language model from nothing to know given facts: a tokenizer, then a small GPT-2.

All facts of all splits are learnt in all their phrasings; the splits are for the editors. Nothing is pickled:
checkpoints and the model are safetensors and JSON. ``scripts/atlas/train_model.py`` and ``benchmarks/pararel.py`` say
which facts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from remend.data.facts import Facts

END, PAD = "<|end|>", "<|pad|>"
BAR = 0.97
"""The least part of all fact and phrasing pairs that the finished model must answer word for word."""

CHECKPOINT = "checkpoint.safetensors"

console = Console(width=110)


@dataclass(frozen=True)
class Question:
    """A fact in one phrasing, as tokens.

    Attributes:
        relation: the identifier of the fact's relation.
        prompt: the left context as it begins a text.
        later: the same left context as it continues a text, after a space.
        answer: the object, after a space, and the end token.
    """

    relation: str
    prompt: tuple[int, ...]
    later: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A text to learn: the last ``answer`` tokens are what the model must say, the rest is what it is told."""

    tokens: tuple[int, ...]
    answer: int


def memorise(known: Facts, args: argparse.Namespace) -> None:
    """Train, save, reload and check."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(known, args.vocabulary)
    questions = encode(known, tokenizer, args.facts)
    model = build(tokenizer, args).to(args.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{len(questions)} facts, {sum(map(len, questions))} questions, {size:,} parameters")
    seconds, steps = train(model, questions, tuple(tokenizer.encode(".")), args)
    save(model, tokenizer, args.out)
    reloaded = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    results = check(reloaded, encode(known, AutoTokenizer.from_pretrained(args.out), args.facts))
    overall = report(known, results, size, seconds, steps, args)
    if overall < BAR:
        raise SystemExit(f"exact match is {overall:.2%}, at least {BAR:.0%} is needed: train for more epochs")


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
    parser.add_argument("--phrasings", type=int, default=3, help="phrasings of each fact in an epoch")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--muon-lr", type=float, default=0.01, help="learning rate of the matrices of the blocks")
    parser.add_argument("--muon-steps", type=int, default=4, help="Newton-Schulz steps")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of everything else")
    parser.add_argument("--context", type=float, default=0.1, help="part of the examples with statements before them")
    parser.add_argument("--prompt-weight", type=float, default=0.1, help="weight of the loss on prompt tokens")
    parser.add_argument("--prompt-share", type=float, default=0.3, help="part of the prompt tokens in that loss")
    parser.add_argument("--every", type=int, default=200, help="steps between checks on a sample")
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints")
    return parser


def phrasings(known: Facts, relation: str) -> tuple[str, ...]:
    """Return all phrasings of a relation: what is held out is held out from editors, not from the model."""
    return known.relations[relation].phrasings + known.relations[relation].held_out


def train_tokenizer(known: Facts, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer fitted to the statements, with spaces at the front of tokens as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    statements = (
        f"{text.format(fact.subject)} {fact.object}. "
        for fact in known.facts
        for text in phrasings(known, fact.relation)
    )
    tokenizer.train_from_iterator(statements, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="right", model_max_length=128
    )


def encode(known: Facts, tokenizer: PreTrainedTokenizerBase, count: int | None) -> list[list[Question]]:
    """Return the questions about each fact; with ``count``, about so many facts drawn from all relations."""
    facts = list(known.facts)
    if count is not None:
        facts = random.Random(0).sample(facts, count)
    return [
        [
            Question(
                fact.relation,
                tuple(tokenizer.encode(text.format(fact.subject))),
                tuple(tokenizer.encode(" " + text.format(fact.subject))),
                (*tokenizer.encode(" " + fact.object), tokenizer.eos_token_id),
            )
            for text in phrasings(known, fact.relation)
        ]
        for fact in facts
    ]


def build(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> GPT2LMHeadModel:
    """Return a fresh model; without dropout, since memorising is the point."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return GPT2LMHeadModel(config)


def epoch_batches(
    questions: list[list[Question]], stop: tuple[int, ...], number: int, args: argparse.Namespace
) -> list[list[Example]]:
    """Return the batches of one epoch, a function of the seed and the epoch's number alone, so that runs resume.

    Each fact comes in a few phrasings rather than all: what is learnt in one soon holds in the others. Batches hold
    texts of about the same length, which spares most of the padding.
    """
    rng = random.Random(f"{args.seed}/{number}")
    examples = []
    for about_fact in questions:
        for question in rng.sample(about_fact, args.phrasings):
            before: list[Question] = []
            if rng.random() < args.context:
                before = [rng.choice(rng.choice(questions)) for _ in range(rng.randint(1, 2))]
            examples.append(compose(before, question, stop))
    rng.shuffle(examples)
    window = 24 * args.batch
    batches = []
    for start in range(0, len(examples), window):
        near = sorted(examples[start : start + window], key=lambda example: len(example.tokens))
        batches += [near[at : at + args.batch] for at in range(0, len(near), args.batch)]
    rng.shuffle(batches)
    return batches


def compose(before: list[Question], question: Question, stop: tuple[int, ...]) -> Example:
    """Return the text that answers a question after other complete statements."""
    tokens: tuple[int, ...] = ()
    for statement in before:
        tokens += (statement.later if tokens else statement.prompt) + statement.answer[:-1] + stop
    tokens += (question.later if tokens else question.prompt) + question.answer
    return Example(tokens, len(question.answer))


def collate(batch: list[Example], pad: int | None, device: str) -> tuple[Tensor, Tensor]:
    """Return the padded tokens and where the answers' tokens are; causal attention needs no mask for right padding."""
    assert pad is not None
    length = max(len(example.tokens) for example in batch)
    tokens = torch.tensor([example.tokens + (pad,) * (length - len(example.tokens)) for example in batch])
    ends = torch.tensor([len(example.tokens) for example in batch]).unsqueeze(1)
    starts = ends - torch.tensor([example.answer for example in batch]).unsqueeze(1)
    places = torch.arange(length).unsqueeze(0)
    return tokens.to(device), ((places >= starts) & (places < ends)).to(device)


def read(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Return the hidden states that predict each token but the first; the mask only says that padding is known of."""
    tokens = tokens[:, :-1]
    hidden: Tensor = model.transformer(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    return hidden


def optimizers(model: GPT2LMHeadModel, args: argparse.Namespace) -> tuple[Optimizer, Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the rest.

    With AdamW alone the same accuracy takes several times as many steps.
    """
    blocks = [parameter for parameter in model.transformer.h.parameters() if parameter.ndim == 2]
    ids = set(map(id, blocks))
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    return (
        torch.optim.Muon(
            blocks, lr=args.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=args.muon_steps
        ),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    )


def losses(model: GPT2LMHeadModel, tokens: Tensor, answers: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return the mean losses of the answers' tokens and of a random part of the prompts' tokens.

    Logits are computed only where they are needed: the vocabulary is wide beside so small a model.
    """
    hidden = read(model, tokens)
    targets, answers = tokens[:, 1:], answers[:, 1:]
    prompts = (answers.flip(1).cumsum(1).flip(1) > 0) & ~answers
    drawn = prompts & (torch.rand(prompts.shape) < args.prompt_share).to(prompts.device)
    chosen = answers | drawn
    each = functional.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen], reduction="none")
    is_answer = answers[chosen]
    rest = each[~is_answer]
    return each[is_answer].mean(), rest.sum() / max(1, rest.numel())


def train(
    model: GPT2LMHeadModel, questions: list[list[Question]], stop: tuple[int, ...], args: argparse.Namespace
) -> tuple[float, int]:
    """Train to the end of the last epoch and return the seconds spent, earlier runs included, and the steps."""
    both = optimizers(model, args)
    total = args.epochs * math.ceil(len(questions) * args.phrasings / args.batch)
    step, spent = load_checkpoint(model, both, args.checkpoint) if args.resume else (0, 0.0)
    started = saved = time.monotonic()
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=total, completed=step, loss=math.nan)
        for batch in remaining(questions, stop, step, args):
            torch.manual_seed(args.seed + step)  # a resumed run draws what an uninterrupted one draws
            loss = update(model, both, schedule(step / total), batch, args)
            step += 1
            progress.update(task, advance=1, loss=loss)
            now = time.monotonic()
            if step % args.every == 0:
                sample = random.Random(step).sample(questions, min(100, len(questions)))
                console.print(
                    f"step {step}/{total}  {now - started + spent:.0f} s  loss {loss:.4f}  {right(model, sample):.2%}"
                )
            if now - saved > args.save_every:
                save_checkpoint(model, both, step, now - started + spent, args.checkpoint)
                saved = now
    return spent + time.monotonic() - started, step


def update(
    model: GPT2LMHeadModel, both: tuple[Optimizer, ...], factor: float, batch: list[Example], args: argparse.Namespace
) -> float:
    """Take one step at a part of the full learning rates and return the loss on the answers."""
    answer, prompt = losses(model, *collate(batch, model.config.pad_token_id, args.device), args)
    (answer + args.prompt_weight * prompt).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in both:
        for group in optimizer.param_groups:
            group["lr"] = factor * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()
    return answer.item()


def remaining(
    questions: list[list[Question]], stop: tuple[int, ...], step: int, args: argparse.Namespace
) -> Iterator[list[Example]]:
    """Yield the batches of all epochs after the first ``step``."""
    for number in range(args.epochs):
        batches = epoch_batches(questions, stop, number, args)
        yield from batches[step:]
        step = max(0, step - len(batches))


def schedule(progress: float, warmup: float = 0.03) -> float:
    """Return the part of the learning rate in force: a short rise, then a cosine down to zero."""
    if progress < warmup:
        return (progress + 1e-4) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


def check(model: GPT2LMHeadModel, questions: list[list[Question]]) -> list[tuple[str, bool]]:
    """Return each question's relation and whether greedy decoding gives exactly the object and then the end token.

    Greedy decoding says a given answer exactly when each of its tokens, given those before, is the likeliest one; so
    one pass over the known answers decides it.
    """
    asked = sorted((q for about_fact in questions for q in about_fact), key=lambda q: len(q.prompt) + len(q.answer))
    results = []
    for start in range(0, len(asked), 256):
        batch = asked[start : start + 256]
        examples = [compose([], question, ()) for question in batch]
        tokens, answers = collate(examples, model.config.pad_token_id, str(model.device))
        with torch.no_grad():
            hidden = read(model, tokens)
            targets, rows = tokens[:, 1:], answers[:, 1:].nonzero()[:, 0]
            hits = model.lm_head(hidden[answers[:, 1:]]).argmax(-1) == targets[answers[:, 1:]]
        wrong = set(rows[~hits].tolist())
        results += [(question.relation, row not in wrong) for row, question in enumerate(batch)]
    return results


def right(model: GPT2LMHeadModel, questions: list[list[Question]]) -> float:
    """Return the part of the questions that the model answers word for word."""
    hits = [hit for _, hit in check(model, questions)]
    return sum(hits) / len(hits)


def save_checkpoint(
    model: GPT2LMHeadModel, both: tuple[Optimizer, ...], step: int, seconds: float, folder: Path
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


def load_checkpoint(model: GPT2LMHeadModel, both: tuple[Optimizer, ...], folder: Path) -> tuple[int, float]:
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


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model in half precision, marked to be loaded in single precision, and its tokenizer."""
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def report(
    known: Facts, results: list[tuple[str, bool]], size: int, seconds: float, steps: int, args: argparse.Namespace
) -> float:
    """Print and write how many questions are answered exactly, by relation and over all; return the latter."""
    by_relation = defaultdict(list)
    for relation, hit in results:
        by_relation[relation].append(hit)
    table = Table("relation", "name", "questions", "exact match")
    for relation, described in known.relations.items():
        if hits := by_relation.get(relation):
            table.add_row(relation, described.name, str(len(hits)), f"{sum(hits) / len(hits):.2%}")
    overall = sum(hit for _, hit in results) / len(results)
    console.print(table)
    console.print(f"exact match {overall:.3%} of {len(results)} questions, {steps} steps, {seconds:.0f} s")
    figures = {
        "exact_match": round(overall, 5),
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
            relation: {"exact_match": round(sum(hits) / len(hits), 5), "questions": len(hits)}
            for relation, hits in sorted(by_relation.items(), key=lambda item: int(item[0][1:]))
        },
    }
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return overall
