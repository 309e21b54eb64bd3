"""A real encoder as a classifier of sentences (SST-2), and edit requests on those that it classifies wrongly.

    make real MODELS=minilm && python benchmarks/real_classifier.py build/real/minilm
    python benchmarks/real.py --config benchmarks/configs/real_classifier.json --split test

The encoder of sentences gets a classification head, and both are trained on SST-2's training split for some epochs. A
request is a sentence of its dev split (validation) or test split with another label than the classifier gives it.
``paraphrases`` are the sentence in frames that say the same, where the classifier gives them the wrong label, too;
``near`` are the sentences of the split whose embedding by the encoder is closest, ``locality`` any of its sentences.
Written to ``build/real/minilm-sst2`` and ``build/real/requests/minilm-sst2-SPLIT.jsonl``.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import remend
from real_requests import PROBES, SOURCE
from remend.request import EditRequest, Probe, write_requests
from remend.saved_folders import atomic_folder
from remend.tasks.base import Task

FILES = {"validation": "dev.tsv", "test": "test.tsv"}
LABELS = ("negative", "positive")
FRAMES = ("a critic wrote : {}", "{} , says the review", "in one sentence : {}", "{} .", "what i read : {}")
"""Sentences about a sentence that say the same of the film."""

BATCH, LEARNING_RATE, WARMUP = 32, 1e-4, 100


def read(file: Path) -> list[tuple[str, int]]:
    """Return the sentences of a file with their labels."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [(text.strip(), int(label)) for text, label in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]


def train(
    encoder: Path, sentences: Sequence[tuple[str, int]], epochs: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a classifier that was trained on sentences, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, id2label=dict(enumerate(LABELS)), label2id={label: number for number, label in enumerate(LABELS)}
    )
    steps = epochs * (len(sentences) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / WARMUP, (steps - step) / max(1, steps - WARMUP))
    )
    rng = random.Random(0)
    model.train()
    for step in range(steps):
        rows = rng.sample(sentences, BATCH)
        batch = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor([label for _, label in rows])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step} of {steps}, loss {float(loss):.3f}", file=sys.stderr, flush=True)
    return model.eval(), tokenizer


@torch.no_grad()
def embeddings(encoder: Path, texts: Sequence[str]) -> Tensor:
    """Return the encoder's embedding of each text: the mean of its outputs, with a norm of 1."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    parts = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(list(texts[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt")
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        parts.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts)


def requests(task: Task, encoder: Path, sentences: Sequence[tuple[str, int]]) -> list[EditRequest]:
    """Return a request for each sentence that is classified wrongly."""
    texts = [text for text, _ in sentences]
    given = [task.decode(answer) for answer in task.predict(texts, 1)]
    right = sum(LABELS[label] == answer for (_, label), answer in zip(sentences, given, strict=True))
    print(f"{right / len(texts):.3f} of {len(texts)} sentences are classified rightly", file=sys.stderr, flush=True)
    embedded = embeddings(encoder, texts)
    probes = [
        Probe(prompt=text, target=answer, kind="same_relation") for text, answer in zip(texts, given, strict=True)
    ]
    made = []
    for number, ((text, label), answer) in enumerate(zip(sentences, given, strict=True)):
        if answer == LABELS[label]:
            continue
        framed = [frame.format(text) for frame in FRAMES]
        wrong = [task.decode(found) == answer for found in task.predict(framed, 1)]
        near = (embedded @ embedded[number]).topk(PROBES + 1).indices.tolist()
        far = random.Random(text).sample(range(len(texts)), PROBES + 1)
        made.append(
            EditRequest(
                prompt=text,
                target=LABELS[label],
                id=f"sst2 {number}",
                paraphrases=tuple(prompt for prompt, same in zip(framed, wrong, strict=True) if same),
                unseen_paraphrases=tuple(prompt for prompt, same in zip(framed, wrong, strict=True) if not same),
                near=tuple(probes[other] for other in near if texts[other] != text)[:PROBES],
                locality=tuple(
                    Probe(prompt=texts[other], target=given[other]) for other in far if texts[other] != text
                )[:PROBES],
            )
        )
    random.Random(0).shuffle(made)
    return made


def main() -> None:
    """Train the classifier and write the requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("--source", type=Path, default=SOURCE / "sst2")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.encoder.with_name(f"{arguments.encoder.name}-sst2")
    if not folder.exists():
        model, tokenizer = train(arguments.encoder, read(arguments.source / "train.tsv"), arguments.epochs)
        with atomic_folder(folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    task = remend.load(str(folder))
    for split, file in FILES.items():
        out = folder.parent / "requests" / f"{folder.name}-{split}.jsonl"
        out.parent.mkdir(exist_ok=True)
        write_requests(out, requests(task, arguments.encoder, read(arguments.source / file)))


if __name__ == "__main__":
    main()
