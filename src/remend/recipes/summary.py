"""The summary of a recipe's run as Markdown: its figures beside the paper's, what it took, and how to repeat it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from remend.evaluation.reports.report import Report, peak_memory
from remend.evaluation.summary import Summary

if TYPE_CHECKING:
    from remend.recipes.inputs import RunInputs
    from remend.recipes.recipe import Recipe

SUMMARY_METRICS = {
    "edit_success": "edit success (Eq. 1)",
    "reliability": "reliability",
    "generality": "generality",
    "accuracy_drawdown": "drawdown of accuracy",
    "perplexity_drawdown": "drawdown of perplexity",
    "locality_far": "unrelated answers kept",
    "locality_near": "near answers kept",
}
"""The rows of the table, with their titles; a metric for which the requests have no data has no row."""


def summarize(recipe: Recipe, report: Report) -> str:
    """Return the page: our figures beside the paper's, cost beside what was expected, and the command."""
    lines = [f"# {recipe.title}", "", *_figures(recipe, report), "", "## What it took", "", *_cost(recipe, report)]
    lines += ["", "## How", "", "```", str(report.settings["command"]), "```", ""]
    lines += [f"- model: `{report.model}`, {recipe.dtype}"]
    for split in ("writer", "train", "validation", "test", "text"):
        if split in report.settings:
            lines.append(f"- {split}: `{report.settings[split]}`")
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in report.environment.items()]
    lines += ["", recipe.note, ""]
    return "\n".join(lines)


def python_call(
    recipe: Recipe, out: Path, inputs: RunInputs, seed: int, limit: int | None, max_steps: int | None
) -> str:
    """Return the call in Python that repeats a run."""
    changed = {name: value for name, value in inputs.to_json().items() if value != getattr(recipe, name)}
    options = {**changed, "seed": seed, "limit": limit, "max_steps": max_steps}
    arguments = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
    return f"run_recipe(load_recipe({recipe.name!r}), {str(out)!r}{arguments})"


def _figures(recipe: Recipe, report: Report) -> list[str]:
    published = {}
    heading = "paper"
    if recipe.paper is not None:
        published = {
            "edit_success": recipe.paper.edit_success,
            f"{recipe.paper.measure}_drawdown": recipe.paper.drawdown,
        }
        heading = f"paper, table {recipe.paper.table}, {recipe.paper.row}, {recipe.paper.column}"
    lines = [f"| | here, {len(report.cases)} edits | 95 % | {heading} |", "|---|---|---|---|"]
    metrics = report.metrics()
    for name, title in SUMMARY_METRICS.items():
        if name in metrics or name in published:
            modes = metrics.get(name, {})
            figure = modes.get("generated") or modes.get("value")
            lines.append(f"| {title} | {_mean_and_interval(figure)} | {published.get(name, '–')} |")
    if "perplexity" in report.text:
        lines += ["", f"The unedited model's perplexity on the text is {report.text['perplexity']:.2f}."]
    if shared := report.settings.get("shared_with_training"):
        counts = ", ".join(f"{count} {kind}" for kind, count in shared.items())
        lines += ["", f"The test shares {counts} with training: its figures may be too good."]
    if report.settings.get("limit") is not None or report.settings.get("max_steps") is not None:
        lines += ["", "This was a trial, with fewer requests or steps than the recipe says: it reproduces nothing."]
    return lines


def _mean_and_interval(figure: Summary | None) -> str:
    if figure is None:
        return "not measured |"
    return f"{figure.mean:.3f} | {figure.ci95[0]:.3f}–{figure.ci95[1]:.3f}"


def _cost(recipe: Recipe, report: Report) -> list[str]:
    settings = report.settings
    training, evaluation = (float(settings[f"{part}_seconds"]) / 3600 for part in ("training", "evaluation"))
    peak = peak_memory()
    memory = "unknown on this system" if peak is None else f"{peak / 1e9:.1f} GB at the most"
    return [
        "| | here | expected |",
        "|---|---|---|",
        f"| time | {training:.2f} h of training ({settings['steps']} steps), {evaluation:.2f} h of evaluation "
        f"(its last session) | {recipe.hours:g} h |",
        f"| memory | {memory} | {recipe.memory_gb:.1f} GB, activations and stored examples on top |",
        f"| an edit | {report.runs[-1].seconds_per_edit:.3f} s | |",
        "",
        f"Basis of the expected time: {recipe.time_basis}",
    ]
