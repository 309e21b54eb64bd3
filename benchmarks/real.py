"""What one correction does to a real language model: whether it takes, generalises, and stays on its subject.

    make real && python benchmarks/real_requests.py build/real/smollm2
    python benchmarks/real.py --split test --only 'fit, one pair'
    python benchmarks/mend_real.py build/real/smollm2 --out build/real/mend-smollm2  # in two runs: see there
    python benchmarks/real_questions.py build/real/smollm2
    python benchmarks/real.py --config benchmarks/configs/real_questions.json --split test
    python benchmarks/real_requests.py build/real/gemma3 --split test --count 50
    python benchmarks/real.py --config benchmarks/configs/real_gemma.json --split test
    python benchmarks/real_classifier.py build/real/minilm
    python benchmarks/real.py --config benchmarks/configs/real_classifier.json --split test
    python benchmarks/real_compositions.py build/real/smollm2 && python benchmarks/real_knowedit.py
    python benchmarks/real.py --config benchmarks/configs/real_compositions.json --split test

Each request is an edit of its own. An answer is right if it begins with the target at a word boundary, and kept if its
first word stays; a chat model's is right if it holds the target, and kept if it stays as far as it is read. Columns are
means over requests of the shares of their prompts, with 95 % bootstrap intervals:

- reliability: the request's own prompt;
- generality: phrasings that the unedited model answers with the true object, too; "all phrasings" counts the others;
- composition, chain, reverse, alias: what follows, which the editor was not told (benchmarks/real_compositions.py,
  benchmarks/real_knowedit.py);
- denied: "It is not true that …" before the prompt, answered with the target; "denied before", by the unedited model,
  with its own answer to the prompt;
- near, far: other prompts of each kind (benchmarks/real_requests.py);
- text, of every fourth edit: choices on WikiText-2 that stay, and the model's perplexity over the unedited one's.

Phrasings that the editor could have been fitted to (given ones, and the common questions of ``fit``) are not scored,
nor is what a set gives to it (``expand`` of a variant: the sizes of :class:`remend.expansion.ExpandConfig`, ``without``
the kinds of items that it leaves out). Other names of the subject are: rules of writing make them, of the pair alone.
What was measured of each request is kept beside the table (``.rows.jsonl``), and not measured again.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import remend
from common import HERE, parser, start, write
from real_questions import says
from remend.data.edit_sets import EditSet
from remend.data.question_rewrites import families
from remend.data.request_files import read_requests
from remend.editors import Editor, editor_class, load_editor, make
from remend.editors.locate_then_edit.common_questions import frames, statements_of
from remend.evaluation.interventions import Intervention, shared_intervention
from remend.evaluation.ordinary_text import OrdinaryText
from remend.expansion import ExpandConfig, expand, implications
from remend.request import Chat, EditRequest, Prompt
from remend.tasks import as_the_model_says
from remend.tasks.base import Answer, Task
from remend.tasks.endings import asks

RIGHT = ("reliability", "generality", "all_phrasings", "composition", "chain", "reverse", "alias", "denied")
"""The columns that are shares of prompts that are answered with a target."""

DENIED = ("It is not true that {}", "It is wrong to say that {}")
"""What denies a statement, in words that stand in no set."""

KINDS = (*RIGHT, "denied_before", "same_object", "same_relation", "same_subject", "far")
"""The columns that are shares of prompts."""

Row = dict[str, float]
"""The shares of one request's prompts by kind, and the seconds of its edit."""

OTHER_PHRASINGS = 4
"""Phrasings that the unedited model does not answer with the true object, of each request."""

TEXT_EVERY = 4
"""Each of so many edits is measured on text, which takes as long as the edit itself."""

RESAMPLES = 2000
"""Bootstrap samples of an interval."""


def asked_of(request: EditRequest, given: Sequence[Prompt]) -> list[tuple[str, Prompt, str]]:
    """Return the prompts of a request that are scored, with their kinds and the answers that are right.

    The right answer of what must stay is the unedited model's, whatever is written here.
    """
    fitted_to = set(map(_text, given))
    if request.subject:
        common = [*frames("statements"), *frames("questions")]
        fitted_to |= {frame.about(request.subject) for frame in common}
        fitted_to |= {
            text.replace("{}", request.subject)
            for name in {*(frame.question for frame in common), *(family.name for family in families())}
            for text in statements_of(name)
        }
    target = request.target
    asked = [("reliability", request.prompt, target)]
    asked += [("generality", prompt, target) for prompt in request.paraphrases if _text(prompt) not in fitted_to]
    other = [prompt for prompt in request.unseen_paraphrases if _text(prompt) not in fitted_to]
    if isinstance(request.prompt, str) and not asks(request.prompt):
        statement = re.sub(r"^(The|In|On|At)\b", lambda word: word[0].lower(), request.prompt)
        asked += [("denied", text.format(statement), target) for text in DENIED]
    drawn = random.Random(str(request.id)).sample(other, min(OTHER_PHRASINGS, len(other)))
    asked += [("other_phrasings", prompt, target) for prompt in drawn]
    asked += [(str(probe.kind), probe.prompt, probe.target) for probe in (*request.portability, *request.near)]
    asked += [("far", probe.prompt, probe.target) for probe in request.locality]
    return asked


def _text(prompt: Prompt) -> str:
    return prompt.messages[-1].content if isinstance(prompt, Chat) else str(prompt)


def is_right(task: Task, prompt: Prompt, answer: Answer, target: str) -> bool:
    """Tell whether an answer is the target: in a chat, which answers in sentences, whether it holds the target."""
    if isinstance(prompt, Chat):
        return says(task.decode(answer), target)
    return task.gives(prompt, answer, task.encode(prompt, target).target)


class Base:
    """The unedited model's answers, which are asked once for all variants, and what it does on ordinary text."""

    def __init__(self, task: Task, text: Sequence[str], tokens: int, new_tokens: int) -> None:
        self.task, self.new_tokens = task, new_tokens
        self.answers: dict[Prompt, Answer] = {}
        self.text = OrdinaryText(task, text, tokens)

    def ask(self, prompts: Sequence[Prompt]) -> None:
        """Keep the unedited model's answers."""
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.answers))
        self.answers |= zip(missing, self.task.predict(missing, self.new_tokens), strict=True)

    def on_text(self, intervention: Intervention) -> Row:
        """Return the share of choices that stay with an edit and, of language models, the ratio of perplexities."""
        (elsewhere,) = self.text.measure(intervention)
        ratio = elsewhere.perplexity_ratio
        return {"text": elsewhere.stays.mean} | ({} if ratio is None else {"perplexity": ratio.mean})


def passages(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return ordinary text: passages that editors measure a model on, and others that edits are measured on."""
    of_files = [
        (HERE.parent / config[name]).read_text(encoding="utf-8").splitlines() for name in ("text", "perplexity_text")
    ]
    text, other = ([line.strip() for line in lines if len(line) > 200] for lines in of_files)
    return text, other


def make_editor(task: Task, variant: Mapping[str, Any], text: Sequence[str]) -> Editor:
    """Return the editor of a variant: a trained one from its folder, or one that needs no training."""
    if "load" in variant:
        return load_editor(HERE.parent / variant["load"])
    kind = editor_class(variant["editor"])
    config = kind.default_config()
    if settings := variant.get("settings"):
        config = type(config)(**{**vars(config), **settings})
    passages = text if "text" in kind.info.options else ()
    return make(variant["editor"], task, passages, config=config, layers=variant.get("layers"))


def with_set(task: Task, bare: EditRequest, sizes: Mapping[str, Any], text: Sequence[str]) -> EditRequest:
    """Return a request with the set that is made from it, without the kinds of items that a variant leaves out.

    Without ``rules``, it is made as if its relation were none of those that rules know.
    """
    left_out, rules = sizes.get("without", ()), sizes.get("rules", True)
    config = ExpandConfig(**{name: value for name, value in sizes.items() if name not in ("without", "rules")})
    with nullcontext() if rules else patch.object(implications, "relations", dict):
        made = expand(task, bare, config, text=text).edit_set
    return EditSet(made.request, tuple(item for item in made.items if item.kind not in left_out)).as_request()


def answers_of(base: Base, intervention: Intervention, number: int, prompts: Sequence[Prompt]) -> list[Answer]:
    """Return the edited model's answers to the prompts of the request with a number."""
    fitting = [intervention.prompt_for(number, prompt, base.new_tokens) or prompt for prompt in prompts]
    with intervention.applied([number]):
        return base.task.predict(fitting, base.new_tokens)


def shares(
    base: Base, request: EditRequest, asked: Sequence[tuple[str, Prompt, str]], answers: Sequence[Answer]
) -> Row:
    """Return the shares of a request's prompts, by kind, that the edited model answers as it should."""
    task = base.task
    of_kind: dict[str, list[bool]] = defaultdict(list)
    for (name, prompt, target), answer in zip(asked, answers, strict=True):
        if name == "other_phrasings" or name in RIGHT:
            right = is_right(task, prompt, answer, target)
        else:
            right = task.gives(prompt, answer, task.answer_span(prompt, base.answers[prompt]))
        of_kind[name].append(right)
    own = task.answer_span(request.prompt, base.answers[request.prompt])
    denied = [prompt for name, prompt, _ in asked if name == "denied"]
    of_kind["denied_before"] = [task.gives(prompt, base.answers[prompt], own) for prompt in denied]
    of_kind["all_phrasings"] = of_kind["generality"] + of_kind["other_phrasings"]
    return {name: sum(of_kind[name]) / len(of_kind[name]) for name in KINDS if of_kind[name]}


def measure(
    base: Base,
    editor: Editor,
    request: EditRequest,
    given: Sequence[Prompt],
    with_text: bool,
    make_set: Callable[[EditRequest], EditRequest] | None = None,
) -> Row:
    """Return the shares of a request's prompts, and the seconds of its edit.

    With a set, what it gives to the editor is not scored, and making it counts as ``set_seconds``.
    """
    task = base.task
    bare = EditRequest(prompt=request.prompt, target=request.target, subject=request.subject, given_paraphrases=given)
    extra: Row = {}
    if make_set is not None:
        began = time.process_time()
        bare = make_set(bare)
        extra["set_seconds"] = time.process_time() - began
    told = {*bare.given_near, *(probe.prompt for probe in bare.given_portability)}
    asked = [
        (name, prompt, target)
        for name, prompt, target in asked_of(request, bare.given_paraphrases)
        if prompt not in told or name == "alias"
    ]
    base.ask([prompt for _, prompt, _ in asked])
    began = time.process_time()
    edit = editor.edit(task, [as_the_model_says(task, bare) if isinstance(request.prompt, Chat) else bare])
    seconds = time.process_time() - began
    intervention = shared_intervention(task, edit, 1)
    row = shares(base, request, asked, answers_of(base, intervention, 0, [prompt for _, prompt, _ in asked]))
    if with_text:
        row |= base.on_text(intervention)
    return {**row, "seconds": seconds, **extra}


def summary(variant: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures of a variant: means of its requests with intervals."""
    figures = {name: [row[name] for row in rows if name in row] for name in (*KINDS, "text", "perplexity")}
    seconds = [row["seconds"] for row in rows]
    means = {name: interval(values) for name, values in figures.items() if values}
    return {"variant": variant, **means, "seconds": {"mean": sum(seconds) / len(seconds), "most": max(seconds)}}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return a mean over requests with its 95 % bootstrap interval, and their number."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return {"mean": sum(values) / len(values), "low": low, "high": high, "requests": len(values)}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as a table in Markdown."""
    names = [name for name in (*KINDS, "text", "perplexity") if any(name in result for result in results)]
    head = ["", *(name.replace("_", " ") for name in names), "CPU s an edit"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for result in results:
        cells = [result["variant"]["name"]]
        for name in names:
            cell = result.get(name)
            digits = 4 if name in ("text", "perplexity") else 3
            cells.append("–" if cell is None else f"{cell['mean']:.{digits}f} ({cell['low']:.2f}–{cell['high']:.2f})")
        lines.append(" | ".join([*cells, f"{result['seconds']['mean']:.1f}"]))
    return "\n".join(f"| {line} |" for line in lines)


def run(config: Mapping[str, Any], out: Path, only: Sequence[str]) -> None:
    """Measure the variants that are asked for; what was measured of a request is kept, and not measured again."""
    task = remend.load(str(HERE.parent / config["model"]))
    requests = read_requests(HERE.parent / config["requests"].format(split=config["split"]))
    if having := set(config.get("having", ())):
        requests = [request for request in requests if having & {name for name, _, _ in asked_of(request, ())}]
    requests = requests[: config["count"]]
    text, other = passages(config)
    base = Base(task, other, config["text_tokens"], config["new_tokens"])
    kept = out.with_suffix(".rows.jsonl")
    rows: dict[tuple[str, str], Row] = {}
    if kept.exists():
        for line in kept.read_text(encoding="utf-8").splitlines():
            name, identifier, row = json.loads(line)
            rows[name, identifier] = row
    results: list[dict[str, Any]] = []
    for variant in config["variants"]:
        name = variant["name"]
        missing = [request for request in requests if (name, str(request.id)) not in rows]
        if missing and (not only or name in only):
            editor = make_editor(task, variant, text)
            sizes = variant.get("expand")
            make_set = None if sizes is None else partial(with_set, task, sizes=sizes, text=text)
            for number, request in enumerate(missing, start=1):
                given = request.paraphrases[: variant.get("given", 0)]
                row = measure(base, editor, request, given, requests.index(request) % TEXT_EVERY == 0, make_set)
                rows[name, str(request.id)] = row
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([name, str(request.id), row]) + "\n")
                print(f"{name}: {number} of {len(missing)}: {row}", file=sys.stderr, flush=True)
        if measured := [rows[name, str(request.id)] for request in requests if (name, str(request.id)) in rows]:
            results.append(summary(variant, measured))
            write(out, config, {"requests": len(requests), "results": results})
            out.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__, "real")
    arguments.add_argument("--split", choices=("validation", "test"))
    arguments.add_argument("--count", type=int)
    arguments.add_argument("--only", action="append", default=[], metavar="NAME", help="a variant's name")
    arguments.add_argument(
        "--having", action="append", choices=KINDS, help="only requests with prompts of one of these kinds"
    )
    parsed = arguments.parse_args()
    config = start(parsed)
    config |= {name: value for name in ("split", "count", "having") if (value := getattr(parsed, name)) is not None}
    run(config, parsed.out, parsed.only)


if __name__ == "__main__":
    main()
