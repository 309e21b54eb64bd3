"""``write_html_report``: a report as one HTML file that needs no network and no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from remend.evaluation.before_after import AnswerComparison
from remend.evaluation.metrics.lm_eval import edits_of_scores
from remend.evaluation.metrics.scorer import MUST_STAY
from remend.evaluation.reports.figure_style import as_svg, check_matplotlib
from remend.evaluation.reports.metric_titles import help_of, main_value, title_of
from remend.evaluation.reports.plots import available_plots
from remend.evaluation.reports.report import Case, Report, Run
from remend.registries import METRICS
from remend.saved_folders import write_text
from remend.visible_text import mark_invisible

PROTOCOL_HELP = {
    "single": "each edit is made of the unedited model and evaluated alone",
    "batched": "several edits are made at once and evaluated while all are applied",
    "sequential": "edits are made one after another, and all so far are evaluated together",
    "checkpoints": "all edits are in another checkpoint",
}


def write_html_report(report: Report, path: str | Path) -> None:
    """Write the report as one self-contained HTML file.

    Raises:
        ConfigError: matplotlib, which draws the plots, is not installed.
        FileError: the file cannot be written.
    """
    check_matplotlib()
    environment = Environment(
        autoescape=True, finalize=visible, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("remend.evaluation.reports").joinpath("html_report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        report=report,
        format_number=format_number,
        protocol_help=PROTOCOL_HELP[report.protocol],
        edits_of_scores=edits_of_scores(report),
        tables=[
            _table(report, run, f"{run.edits} edits applied" if len(report.runs) > 1 else "") for run in report.runs
        ],
        plots={name: Markup(as_svg(draw())) for name, draw in available_plots(report).items()},
        columns=_embed(_columns(report)),
        cases=_embed(_cases(report)),
    )
    write_text(path, page)


def format_number(value: float) -> str:
    """Format a number for tables: with three decimals, or fewer digits if it is large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 100_000 else f"{value:.1e}"


def _table(report: Report, run: Run, title: str) -> dict[str, Any]:
    """Return the table of a run's metrics for the template."""
    baselines = report.baseline_metrics(run)
    rows = [
        {
            "name": title_of(name),
            "help": help_of(name),
            "main": main_value(modes),
            "forced": modes.get("teacher_forced"),
            "contains": modes.get("contains"),
            "f1": modes.get("token_f1"),
            "baselines": [main_value(metrics[name]) if name in metrics else None for metrics in baselines.values()],
        }
        for name, modes in run.metrics().items()
    ]
    return {"title": title, "rows": rows, "baselines": [name.replace("_", " ") for name in baselines]}


GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "the pair": "followed",
        "other ways to ask": "followed",
        "what follows": "followed",
        "what should stay": "stayed",
        "what should no longer be said": "is not said",
        "free text": "",
    }
)
"""What prompts are to an edit, in the order in which they are shown, and what those did that are right."""


def _columns(report: Report) -> list[dict[str, Any]]:
    """Return the metrics that have a column in the table of edits."""
    measured = report.metrics()
    return [
        {"name": metric.name, "title": title_of(metric.name), "higher_is_better": metric.higher_is_better}
        for metric in METRICS
        if metric.headline and metric.name in measured
    ]


def _cases(report: Report) -> list[dict[str, Any]]:
    """Return the edits of the last run for the table of edits."""
    return [
        {
            "id": str(case.id),
            "prompt": case.prompt,
            "target": case.target,
            "before": case.before,
            "about": dict(case.about),
            "values": {name: main_value(modes) for name, modes in case.values.items()},
            "groups": _groups(case),
        }
        for case in report.cases
    ]


def _groups(case: Case) -> list[dict[str, Any]]:
    """Return the answers to an edit's prompts by what the prompts are to it, with how many are as they should be."""
    groups: dict[str, list[AnswerComparison]] = {title: [] for title in GROUPS}
    for answer in case.answers:
        groups[_group(answer.kind)].append(answer)
    return [
        {
            "title": title,
            "right": sum(bool(answer.ok) for answer in answers),
            "judged": sum(answer.ok is not None for answer in answers),
            "done": GROUPS[title],
            "answers": [[a.kind, a.prompt, a.wanted, a.before, a.after, a.ok] for a in answers],
        }
        for title, answers in groups.items()
        if answers
    ]


def _group(kind: str) -> str:
    """Return to which of :data:`GROUPS` a kind of prompt belongs."""
    if kind == "prompt":
        return "the pair"
    if kind in ("paraphrase", "unseen paraphrase") or kind.startswith("as a "):
        return "other ways to ask"
    if kind in MUST_STAY:
        return "what should stay"
    if kind in ("negated", "outdated"):
        return "what should no longer be said"
    return "free text" if kind == "generation" else "what follows"  # probes say of what kind they are in any words


def visible(value: Any) -> Any:
    """Return a text with invisible characters marked, and anything else as it is."""
    return mark_invisible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _embed(value: Any) -> Markup:
    """Return JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    # Prompts and answers are anybody's text: `</script>` in one of them would end the element.
    text = mark_invisible(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
