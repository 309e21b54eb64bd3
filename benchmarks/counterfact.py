"""CounterFact from end to end: a model that knows its facts, an editor trained on some subjects, judged on others.

    python benchmarks/counterfact.py --source COUNTERFACT --templates PARAREL/templates.json

``COUNTERFACT`` is a folder with CounterFact's rows as JSON lines (``train.jsonl``, ``val.jsonl``: subject, relation,
template, ground_truth, target_new), and the templates are those of each relation with their counts. Facts with enough
neighbours are chosen; a GPT-2 is trained from nothing to know them in five phrasings each; then ``remend train`` and
``remend evaluate`` do what they do with anybody's model. Each test request is CounterFact's own: its template, its
subject, its new target. On one thread in about an hour; models and requests go to ``build/counterfact``, the figures to
``benchmarks/results/counterfact.json`` and, as a table, beside it. ``--resume`` goes on with the model's checkpoint;
``--only-model`` ends with the folder that ``python -m benchmarks.paper --testbed`` takes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "scripts"))

from fact_trainer import train_on_facts
from statement_trainer import StatementTrainer, parser

import common
import remend
from pararel import TARGETS, digest, read_relations, split_of
from remend.data.facts import Fact, FactSet, Relation
from remend.evaluation.reports.report import metrics_of
from remend.request import write_requests
from remend.serialization import write_json
from remend.training import PRESETS

FEWEST, LARGEST = 5, 130
"""Facts with one object in a relation, at least; facts of a relation, at most."""

SHOWN = {
    "reliability": "the prompt itself",
    "generality": "three paraphrases",
    "generality_unseen": "a phrasing that training never saw",
    "edit_success": "prompt and paraphrases together",
    "locality_far": "far: other facts keep their answer",
    "locality_near": "near: all below",
    "locality_near_same_object": "– same question, another subject with the same true answer",
    "locality_near_same_relation": "– same question, another subject, where none has the same answer",
    "locality_near_same_subject": "– another question about the same subject",
    "locality_adversarial": "far, with the edit put before the prompt",
    "accuracy_drawdown": "accuracy drawdown",
}
"""Rows of the table, by metric."""


class CounterFacts(FactSet):
    """CounterFact's facts, each with its own first request.

    Args:
        facts: the facts.
        relations: how they are asked.
        own: each fact's template and new target.
    """

    def __init__(self, facts: list[Fact], relations: dict[str, Relation], own: dict[Fact, tuple[str, str]]) -> None:
        super().__init__(facts, relations)
        self.own = own

    def _draw_phrasings_and_target(self, fact: Fact, number: int, rng: random.Random) -> tuple[list[str], str]:
        phrasings, target = super()._draw_phrasings_and_target(fact, number, rng)
        if number:
            return phrasings, target
        template, target = self.own[fact]
        return [template, *(phrasing for phrasing in phrasings if phrasing != template)], target


def main() -> None:
    """Choose the facts, train the model and the editor, and judge what it does on the test split."""
    folder = Path("build/counterfact")
    made = parser(__doc__, folder / "model", folder / "model_report.json", folder)
    made.add_argument("--source", type=Path, default=HERE.parents[1] / "shared/data/counterfact")
    made.add_argument("--templates", type=Path, default=HERE.parents[1] / "shared/data/pararel/templates.json")
    made.add_argument("--result", type=Path, default=HERE / "results" / "counterfact.json")
    made.add_argument("--steps", type=int, default=PRESETS["default"][1].max_steps, help="of the editor's training")
    made.add_argument("--only-model", action="store_true", help="make the model and the requests, and no editor")
    made.set_defaults(phrasings=2)
    arguments = made.parse_args()
    began = time.perf_counter()
    known = choose(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    files = {split: arguments.out.parent / f"{split}.jsonl" for split in TARGETS}
    for split, targets in TARGETS.items():
        write_requests(files[split], list(known.requests(split, targets)))
    if arguments.resume or not (arguments.out / "config.json").exists():
        train_on_facts(StatementTrainer, known, arguments)
    if arguments.only_model:
        return
    trained = time.perf_counter() - began
    report = edit(arguments, files)
    write(arguments, known, report, {"model_seconds": trained, "all_seconds": time.perf_counter() - began})


def choose(arguments: argparse.Namespace) -> CounterFacts:
    """Facts asked in one of their relation's commonest templates, whose object is several subjects' answer."""
    relations = read_relations(arguments.templates)
    rows = [
        json.loads(line) for file in sorted(arguments.source.glob("*.jsonl")) for line in file.open(encoding="utf-8")
    ]
    own: dict[Fact, tuple[str, str]] = {}
    asked: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: digest(f"{row['case_id']}")):
        relation, subject = row["relation"], row["subject"]
        if relation in relations and row["template"] in relations[relation].all_phrasings:
            fact = Fact(subject, relation, row["ground_truth"], split_of(subject))
            if not any(asked[phrasing.format(subject)] for phrasing in relations[relation].all_phrasings):
                own[fact] = (row["template"], row["target_new"])
                asked.update(phrasing.format(subject) for phrasing in relations[relation].all_phrasings)
    alike = Counter((fact.relation, fact.object) for fact in own)
    kept: Counter[str] = Counter()
    facts = []
    for fact in own:
        if alike[fact.relation, fact.object] >= FEWEST and kept[fact.relation] < LARGEST:
            kept[fact.relation] += 1
            facts.append(fact)
    facts.sort(key=lambda fact: (fact.relation, fact.subject))
    return CounterFacts(facts, {name: one for name, one in relations.items() if kept[name]}, own)


def edit(arguments: argparse.Namespace, files: dict[str, Path]) -> remend.Report:
    """What an editor of the default preset does, trained on the training split's subjects."""
    task = remend.load(str(arguments.out), "cpu")
    requests = {split: remend.read_source(str(file)) for split, file in files.items()}
    settings = replace(PRESETS["default"][1], max_steps=arguments.steps)
    editor = remend.train(task, requests["train"], requests["validation"], config=settings)
    editor.save_pretrained(arguments.out.parent / "editor")
    return remend.evaluate(
        task, editor, requests["test"], scales=(0.5, 1.5), data="counterfact:test", name="mend, default"
    )


def write(arguments: argparse.Namespace, known: CounterFacts, report: remend.Report, seconds: dict[str, float]) -> None:
    """The figures as JSON, and as a table beside it."""
    found = {"edited": report.cases, **report.baselines}
    figures = {
        name: {
            metric: {mode: [own.mean, *own.ci95, own.n] for mode, own in modes.items()} for metric, modes in m.items()
        }
        for name, m in ((name, metrics_of(cases)) for name, cases in found.items())
    }
    knows = json.loads(arguments.report.read_text(encoding="utf-8"))
    facts = Counter(fact.split for fact in known.facts)
    result = {
        "facts": facts,
        "knows": {key: knows[key] for key in ("exact_match", "parameters", "seconds")},
        "seconds": seconds,
        "figures": figures,
        "environment": common.environment(common.torch.device("cpu")),
    }
    write_json(arguments.result, result)
    lines = [
        f"CounterFact: {len(known.facts):,} facts that a GPT-2 of {knows['parameters'] / 1e6:.1f} million parameters "
        f"knows ({knows['exact_match']:.4f} exact match over five phrasings); an editor trained on the "
        f"{facts['train']:,} of the training split, judged on the {facts['test']:,} of the test split, whose subjects "
        "it never saw. "
        f"All in {seconds['all_seconds'] / 60:.0f} minutes on one thread (`python benchmarks/counterfact.py`).",
        "",
        "| | generated | 95 % | teacher forced | unedited | fact in the prompt |",
        "|---|---|---|---|---|---|",
    ]
    for metric, words in SHOWN.items():
        if metric not in figures["edited"]:
            continue
        mean, low, high, _ = figures["edited"][metric]["generated"]
        cells = [f"{mean:.3f}", f"{low:.3f} – {high:.3f}", f"{figures['edited'][metric]['teacher_forced'][0]:.3f}"]
        beside = [figures[name].get(metric) for name in report.baselines]
        cells += ["" if own is None else f"{own['generated'][0]:.3f}" for own in beside]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    arguments.result.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
