"""What a model knows of answers, asked alone and after examples: how sets find what follows (remend.expansion).

    python benchmarks/known_facts.py

Facts of ParaRel (T-REx) about names that are objects of other facts there, in the statements of the rules. An answer is
right if it is one of the objects, with or without an article. Of each threshold: how many answers are surer than it,
and how many of those are right.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import remend
from common import HERE, parser, start, write
from real_requests import SOURCE
from remend.editors.locate_then_edit.common_questions import next_tokens
from remend.expansion.premise import short_answers
from remend.expansion.relations import relations
from remend.tasks.base import Task

ASKED: Mapping[str, tuple[str, str, str]] = {
    "capital": ("country", "P36", "P17"),
    "continent": ("country", "P30", "P17"),
    "official language": ("country", "P37", "P17"),
}
"""Of each fact: the kind of answers it is asked of, its number in Wikidata, and that of which names are objects."""


def measure(
    task: Task, texts: Sequence[str], truth: Sequence[set[str]], thresholds: Sequence[float]
) -> dict[str, dict[str, int]]:
    """Return how many answers are right, of all and of those that are surer than each threshold."""
    sure = next_tokens(task, texts).amax(1).tolist()
    answers = [answer.casefold().removeprefix("the ") for answer in short_answers(task, texts)]
    right = [answer in {name.casefold() for name in names} for answer, names in zip(answers, truth, strict=True)]
    counts = {}
    for least in (0.0, *thresholds):
        of_sure = [is_right for p, is_right in zip(sure, right, strict=True) if p >= least]
        counts[f"p >= {least}"] = {"answers": len(of_sure), "right": sum(of_sure)}
    return counts


def run(config: Mapping[str, Any], out: Path) -> None:
    """Ask the model, and write what was counted."""
    task = remend.load(str(HERE.parent / config["model"]))
    facts: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in (SOURCE / "pararel" / "facts.tsv").open(encoding="utf-8"):
        subject, relation, answer = line.rstrip("\n").split("\t")
        facts[relation][subject].add(answer)
    results = {}
    for question, (of, number, source) in ASKED.items():
        hop = next(hop for hop in relations()[of].hops if hop.question == question)
        told = {name for name, _ in hop.examples}
        known = sorted({o for answers in facts[source].values() for o in answers if facts[number].get(o)} - told)
        names = random.Random(config["seed"]).sample(known, min(config["count"], len(known)))
        forms = {
            "alone": [hop.statement.replace("{}", name) for name in names],
            "after examples": [hop.after_examples(name, task) for name in names],
        }
        truth = [facts[number][name] for name in names]
        results[question] = {form: measure(task, texts, truth, config["thresholds"]) for form, texts in forms.items()}
        print(question, results[question], flush=True)
    write(out, config, {"results": results})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parsed = parser(__doc__, "known_facts").parse_args(arguments)
    run(start(parsed), parsed.out)


if __name__ == "__main__":
    main()
