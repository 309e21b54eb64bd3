"""The report as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from remend.evaluation.metrics.lm_eval import after_what
from remend.evaluation.reports.plots import check_matplotlib, pictures, svg
from remend.evaluation.reports.report import Report, Run
from remend.serialization import write_text

WORDS = {
    "reliability": "the edited prompt itself is answered with the target",
    "generality": "paraphrases are answered with the target",
    "generality_unseen": "so are phrasings that training never saw",
    "edit_success": "prompt and paraphrases together (MEND, Eq. 1)",
    "format_shift": "the same asked in another form: question, completion, chat",
    "portability": "what follows from the edit is answered rightly",
    "portability_negated": "prompts that deny the fact are not answered with it",
    "locality_far": "unrelated prompts keep their answer",
    "locality_near": "related prompts that must stay keep their answer",
    "locality_adversarial": "unrelated prompts keep their answer with the edit put before them",
    "accuracy_drawdown": "right answers to unrelated prompts that were lost",
    "perplexity_drawdown": "perplexity that an edit adds on a text",
    "kl_far": "divergence from the unedited model at unrelated prompts, in nats",
    "kl_near": "divergence at related prompts, in nats",
    "kl_adversarial": "divergence with the edit put before the prompt, in nats",
    "target_probability": "probability of the target at the edited prompt",
    "target_rank": "place of the target's first token among all tokens",
    "fluency": "entropy of a continuation's bi- and trigrams, in bits",
    "repetition": "trigrams of a continuation that stood in it before",
}
"""What each metric says, for readers of the page."""


def write_page(report: Report, path: str | Path) -> None:
    """Write the report as one self-contained HTML file.

    Raises:
        ConfigError: matplotlib, which draws its pictures, is not installed.
        FileError: it cannot be written there.
    """
    check_matplotlib()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("remend.evaluation.reports").joinpath("html_report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        report=report,
        figure=figure,
        after_what=after_what(report),
        tables=[_table(report, run, f"{run.edits} at work" if len(report.runs) > 1 else "") for run in report.runs],
        pictures={name: Markup(svg(draw())) for name, draw in pictures(report).items()},
        cases=_embedded(_cases(report)),
    )
    write_text(path, page)


def figure(value: float) -> str:
    """A number as tables show it: three decimals, or as many digits as say something."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 100_000 else f"{value:.1e}"


def _table(report: Report, run: Run, title: str) -> dict[str, Any]:
    """Rows of the headline table."""
    beside = report.beside(run)
    rows = []
    for name, modes in run.metrics().items():
        free = modes.get("generated") or modes["value"]
        others = [own.get(name, {}) for own in beside.values()]
        rows.append(
            {
                "name": name.replace("_", " "),
                "words": WORDS.get(name, ""),
                "main": free,
                "forced": modes.get("teacher_forced"),
                "contains": modes.get("contains"),
                "f1": modes.get("token_f1"),
                "beside": [own.get("generated") or own.get("value") for own in others],
            }
        )
    return {"title": title, "rows": rows, "beside": [name.replace("_", " ") for name in beside]}


def _cases(report: Report) -> list[dict[str, Any]]:
    """The last run's edits for the browsable table, those that went worst first."""
    found = []
    for case in report.cases:
        values = {name: modes.get("generated", modes.get("value")) for name, modes in case.values.items()}
        found.append(
            {
                "id": str(case.id),
                "prompt": case.prompt,
                "target": case.target,
                "before": case.before,
                "about": dict(case.about),
                "values": values,
                "answers": [[a.kind, a.prompt, a.wanted, a.before, a.after, a.ok] for a in case.answers],
            }
        )
    return found


def _embedded(value: Any) -> Markup:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
