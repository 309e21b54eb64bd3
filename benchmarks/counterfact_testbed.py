"""CounterFact end to end: train a model on its facts, train an editor on some subjects, evaluate it on others.

    python benchmarks/counterfact_testbed.py --source COUNTERFACT --templates PARAREL/templates.json

``COUNTERFACT`` is a folder with CounterFact's rows as JSON lines (``train.jsonl``, ``val.jsonl``: subject, relation,
template, ground_truth, target_new), and the templates are those of each relation with their counts. Facts with enough
near probes are chosen, a GPT-2 is trained from scratch to know them in five phrasings each, and an editor is trained
and evaluated as with any other model. Each test request has CounterFact's template, subject and new target. It takes
about an hour on one thread. Models and requests are written to ``build/counterfact``, the figures to
``benchmarks/results/counterfact.json`` and a Markdown table. ``--resume`` continues the model's training;
``--only-model`` stops after the folder that ``python -m benchmarks.paper --testbed`` takes.
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

from base_trainer import train_on_facts
from statement_trainer import StatementTrainer, parser

import common
import remend
from pararel_testbed import TARGETS, digest, read_relations, split_of
from remend.data.fact_requests import Fact, FactSet, Relation
from remend.evaluation.reports.report import metrics_of
from remend.request import write_requests
from remend.saved_folders import write_json
from remend.training import PRESETS

MIN_PER_OBJECT, MAX_PER_RELATION = 5, 130
"""Facts of a relation with the same object, at least; facts of a relation, at most."""

METRICS = {
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
"""The metrics of the table, with the titles of their rows."""


class CounterFacts(FactSet):
    """CounterFact's facts, each with CounterFact's own request as its first one.

    Args:
        facts: the facts.
        relations: the phrasings of each relation.
        published: each fact's template and new target in CounterFact.
    """

    def __init__(
        self, facts: list[Fact], relations: dict[str, Relation], published: dict[Fact, tuple[str, str]]
    ) -> None:
        super().__init__(facts, relations)
        self.published = published

    def _draw_phrasings_and_target(self, fact: Fact, number: int, rng: random.Random) -> tuple[list[str], str]:
        phrasings, target = super()._draw_phrasings_and_target(fact, number, rng)
        if number:
            return phrasings, target
        template, target = self.published[fact]
        return [template, *(phrasing for phrasing in phrasings if phrasing != template)], target


def main() -> None:
    """Choose the facts, train the model and the editor, and evaluate it on the test split."""
    folder = Path("build/counterfact")
    arguments_parser = parser(__doc__, folder / "model", folder / "model_report.json", folder)
    arguments_parser.add_argument("--source", type=Path, default=HERE.parents[1] / "shared/data/counterfact")
    arguments_parser.add_argument(
        "--templates", type=Path, default=HERE.parents[1] / "shared/data/pararel/templates.json"
    )
    arguments_parser.add_argument("--result", type=Path, default=HERE / "results" / "counterfact.json")
    arguments_parser.add_argument(
        "--steps", type=int, default=PRESETS["default"][1].max_steps, help="of the editor's training"
    )
    arguments_parser.add_argument(
        "--only-model", action="store_true", help="make the model and the requests, and no editor"
    )
    arguments_parser.set_defaults(phrasings=2)
    arguments = arguments_parser.parse_args()
    start = time.perf_counter()
    facts = choose_facts(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    files = {split: arguments.out.parent / f"{split}.jsonl" for split in TARGETS}
    for split, targets in TARGETS.items():
        write_requests(files[split], list(facts.requests(split, targets)))
    if arguments.resume or not (arguments.out / "config.json").exists():
        train_on_facts(StatementTrainer, facts, arguments)
    if arguments.only_model:
        return
    model_seconds = time.perf_counter() - start
    report = train_and_evaluate(arguments, files)
    write(arguments, facts, report, {"model_seconds": model_seconds, "all_seconds": time.perf_counter() - start})


def choose_facts(arguments: argparse.Namespace) -> CounterFacts:
    """Return facts in a common template of their relation, whose object is the answer for several subjects."""
    relations = read_relations(arguments.templates)
    rows = [
        json.loads(line) for file in sorted(arguments.source.glob("*.jsonl")) for line in file.open(encoding="utf-8")
    ]
    published: dict[Fact, tuple[str, str]] = {}
    prompts: set[str] = set()
    for row in sorted(rows, key=lambda row: digest(f"{row['case_id']}")):
        relation, subject = row["relation"], row["subject"]
        if relation in relations and row["template"] in relations[relation].all_phrasings:
            fact = Fact(subject, relation, row["ground_truth"], split_of(subject))
            new_prompts = {phrasing.format(subject) for phrasing in relations[relation].all_phrasings}
            if prompts.isdisjoint(new_prompts):  # a prompt has one answer
                published[fact] = (row["template"], row["target_new"])
                prompts |= new_prompts
    same_object = Counter((fact.relation, fact.object) for fact in published)
    chosen: Counter[str] = Counter()
    facts = []
    for fact in published:
        if same_object[fact.relation, fact.object] >= MIN_PER_OBJECT and chosen[fact.relation] < MAX_PER_RELATION:
            chosen[fact.relation] += 1
            facts.append(fact)
    facts.sort(key=lambda fact: (fact.relation, fact.subject))
    used = {name: relation for name, relation in relations.items() if chosen[name]}
    return CounterFacts(facts, used, published)


def train_and_evaluate(arguments: argparse.Namespace, files: dict[str, Path]) -> remend.Report:
    """Train an editor of the default preset on the training split, and return its report on the test split."""
    task = remend.load(str(arguments.out), "cpu")
    requests = {split: remend.read_source(str(file)) for split, file in files.items()}
    settings = replace(PRESETS["default"][1], max_steps=arguments.steps)
    editor = remend.train(task, requests["train"], requests["validation"], config=settings)
    editor.save(arguments.out.parent / "editor")
    return remend.evaluate(
        task, editor, requests["test"], strengths=(0.5, 1.5), data="counterfact:test", name="mend, default"
    )


def write(
    arguments: argparse.Namespace, fact_set: CounterFacts, report: remend.Report, seconds: dict[str, float]
) -> None:
    """Write the figures as JSON and as a Markdown table."""
    cases_by_name = {"edited": report.cases, **report.baselines}
    figures = {
        name: {
            metric: {mode: [figure.mean, *figure.ci95, figure.n] for mode, figure in modes.items()}
            for metric, modes in metrics_of(cases).items()
        }
        for name, cases in cases_by_name.items()
    }
    model_report = json.loads(arguments.report.read_text(encoding="utf-8"))
    facts = Counter(fact.split for fact in fact_set.facts)
    result = {
        "facts": facts,
        "knows": {key: model_report[key] for key in ("exact_match", "parameters", "seconds")},
        "seconds": seconds,
        "figures": figures,
        "environment": common.environment(common.torch.device("cpu")),
    }
    write_json(arguments.result, result)
    lines = [
        f"CounterFact: {len(fact_set.facts):,} facts that a GPT-2 of {model_report['parameters'] / 1e6:.1f} million "
        f"parameters knows ({model_report['exact_match']:.4f} exact match over five phrasings); an editor trained on "
        f"the {facts['train']:,} of the training split and evaluated on the {facts['test']:,} of the test split, with "
        "other subjects. "
        f"All in {seconds['all_seconds'] / 60:.0f} minutes on one thread (`python benchmarks/counterfact_testbed.py`).",
        "",
        "| | generated | 95 % | teacher forced | unedited | fact in the prompt |",
        "|---|---|---|---|---|---|",
    ]
    for metric, title in METRICS.items():
        if metric not in figures["edited"]:
            continue
        mean, low, high, _ = figures["edited"][metric]["generated"]
        cells = [f"{mean:.3f}", f"{low:.3f} – {high:.3f}", f"{figures['edited'][metric]['teacher_forced'][0]:.3f}"]
        baselines = [figures[name].get(metric) for name in report.baselines]
        cells += ["" if modes is None else f"{modes['generated'][0]:.3f}" for modes in baselines]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    arguments.result.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
