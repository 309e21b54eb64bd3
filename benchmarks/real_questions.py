"""Edit requests on questions that a chat model answers wrongly (zsRE), with near and unrelated questions.

    python benchmarks/real_questions.py build/real/smollm2

The target is zsRE's answer, which the unedited model's own answer does not hold. ``paraphrases`` is zsRE's rephrasing,
whatever the model answers to it; ``near`` is the same question about other subjects and requests of another kind about
the same one, of which the model's answers are the surest; ``locality`` is questions of NQ.
Splits are by subject, as those of benchmarks/real_requests.py. Written to
``build/real/requests/MODEL-questions-SPLIT.jsonl``.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from real_requests import PROBES, probe, split_of, write_splits
from remend.request import Chat, EditRequest, Probe
from remend.tasks.base import Example, Task

ANSWER_TOKENS = 24
"""Tokens of an answer that are read."""

ABOUT_SUBJECT = (
    "Write a short poem about {}.",
    "Write a title for a news article about {}.",
    "Tell me a joke about {}.",
    "Is {} well known?",
    "What should I read to learn more about {}?",
    "How many letters are in {}?",
    "Translate into Spanish: I read about {} yesterday.",
    "Name three things that people think of when they hear {}.",
)
"""What is asked of any subject and is no question of its own; ``fit`` asks none of them."""

AT_ONCE = 64
"""Questions that the model is asked together."""


def chat(question: str) -> Chat:
    """Return a question as a conversation of one message."""
    text = question.strip()
    return Chat.of([{"role": "user", "content": text[:1].upper() + text[1:]}])


def says(answer: str, target: str) -> bool:
    """Tell whether an answer holds the target as whole words."""
    return re.search(rf"(?<!\w){re.escape(target)}(?!\w)", answer, flags=re.IGNORECASE) is not None


def build(task: Task, rows: Sequence[Mapping[str, Any]], split: str, count: int) -> list[EditRequest]:
    """Return requests on questions of a split that the model answers otherwise."""
    rows = [row for row in rows if split_of(row["subject"]) == split and row["subject"] in row["src"]]
    alike: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        alike[row["src"].replace(row["subject"], "{}")].append(row)
    random.Random(split).shuffle(rows)
    requests: dict[str, EditRequest] = {}
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        answers = task.predict([chat(row["src"]) for row in part], ANSWER_TOKENS)
        for row, answer in zip(part, answers, strict=True):
            taken = row["subject"] in requests or len(requests) == count
            if not taken and not says(task.decode(answer), row["alt"]):
                others = alike[row["src"].replace(row["subject"], "{}")]
                requests[row["subject"]] = make_request(
                    task, row, others, rows, random.Random(f"{split} {row['case_id']}")
                )
        print(f"{len(requests)} of {count}", file=sys.stderr, flush=True)
        if len(requests) == count:
            break
    return list(requests.values())


def make_request(
    task: Task,
    row: Mapping[str, Any],
    alike: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    rng: random.Random,
) -> EditRequest:
    """Return the request of a question with its probes."""
    others = [other for other in alike if other["subject"] != row["subject"] and other["alt"] != row["alt"]]
    near = rng.sample(others, min(PROBES, len(others)))
    far = rng.sample(rows, PROBES)
    return EditRequest(
        prompt=chat(row["src"]),
        target=row["alt"],
        subject=row["subject"],
        id=f"zsre {row['case_id']}",
        paraphrases=(chat(row["rephrase"]),),
        near=(
            *(probe(chat(other["src"]), other["alt"], "same_relation") for other in near),
            *surest_answers(task, [chat(text.format(row["subject"])) for text in ABOUT_SUBJECT]),
        ),
        locality=tuple(
            Probe(prompt=chat(other["loc"].removeprefix("nq question:").rstrip("? ") + "?"), target=other["loc_ans"])
            for other in far
        ),
    )


def surest_answers(task: Task, prompts: Sequence[Chat]) -> list[Probe]:
    """Return the prompts about a subject whose answers a model is the surest of, by mean log p of their tokens.

    What it makes up about a name that it does not know, any change of the model changes.
    """
    answers = task.predict(prompts, ANSWER_TOKENS)
    examples = [Example(tuple(task.encode_input(p)), a) for p, a in zip(prompts, answers, strict=True)]
    sure = [sum(log_p) / len(log_p) for log_p in task.log_probabilities(examples)]
    best = sorted(range(len(prompts)), key=lambda index: -sure[index])[: PROBES // 2]
    return [probe(prompts[index], task.decode(answers[index]), "same_subject") for index in best]


def read_questions(source: Path) -> list[dict[str, Any]]:
    """Return the rows of zsRE."""
    rows: list[dict[str, Any]] = json.loads((source / "zsre" / "train_10k.json").read_text(encoding="utf-8"))
    return rows


if __name__ == "__main__":
    write_splits(__doc__, "-questions", 100, lambda task, source: partial(build, task, read_questions(source)))
