"""What a recipe's run found, for people: a page of Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from remend.evaluation.reports.report import Report, Summary, peak_memory

if TYPE_CHECKING:
    from remend.recipes.inputs import Ingredients
    from remend.recipes.recipe import Recipe

FIGURES = {
    "edit_success": "edit success (Eq. 1)",
    "reliability": "reliability",
    "generality": "generality",
    "accuracy_drawdown": "drawdown of accuracy",
    "perplexity_drawdown": "drawdown of perplexity",
    "locality_far": "unrelated answers kept",
    "locality_near": "near answers kept",
}
"""What is told of each run, in order; what its requests have no data for is left out."""


def summary(recipe: Recipe, report: Report) -> str:
    """Our figures beside the paper's, what the run took beside what was expected, and how to repeat it."""
    lines = [f"# {recipe.title}", "", *_figures(recipe, report), "", "## What it took", "", *_taken(recipe, report)]
    lines += ["", "## How", "", "```", str(report.settings["command"]), "```", ""]
    lines += [f"- model: `{report.model}`, {recipe.dtype}"]
    for split in ("writer", "train", "validation", "test", "text"):
        if split in report.settings:
            lines.append(f"- {split}: `{report.settings[split]}`")
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in report.environment.items()]
    lines += ["", recipe.note, ""]
    return "\n".join(lines)


def _figures(recipe: Recipe, report: Report) -> list[str]:
    beside = {}
    head = "paper"
    if recipe.paper is not None:
        beside = {
            "edit_success": recipe.paper.edit_success,
            f"{recipe.paper.measure}_drawdown": recipe.paper.drawdown,
        }
        head = f"paper, table {recipe.paper.table}, {recipe.paper.row}, {recipe.paper.column}"
    lines = [f"| | here, {len(report.cases)} edits | 95 % | {head} |", "|---|---|---|---|"]
    found = report.metrics()
    for name, told in FIGURES.items():
        if name in found or name in beside:
            own = found.get(name, {})
            figure = own.get("generated") or own.get("value")
            lines.append(f"| {told} | {_cells(figure)} | {beside.get(name, '–')} |")
    if report.text:
        lines += ["", f"The unedited model's perplexity on the text is {report.text['perplexity']:.2f}."]
    if common := report.settings.get("shared_with_training"):
        told = ", ".join(f"{count} {kind}" for kind, count in common.items())
        lines += ["", f"The test shares {told} with training: its figures may be too good."]
    if report.settings.get("limit") is not None or report.settings.get("max_steps") is not None:
        lines += ["", "This was a trial, with fewer requests or steps than the recipe says: it reproduces nothing."]
    return lines


def _cells(figure: Summary | None) -> str:
    if figure is None:
        return "not measured |"
    return f"{figure.mean:.3f} | {figure.ci95[0]:.3f}–{figure.ci95[1]:.3f}"


def _taken(recipe: Recipe, report: Report) -> list[str]:
    settings = report.settings
    training, evaluation = (float(settings[f"{part}_seconds"]) / 3600 for part in ("training", "evaluation"))
    peak = peak_memory()
    held = "not told by this system" if peak is None else f"{peak / 1e9:.1f} GB at the most"
    return [
        "| | here | expected |",
        "|---|---|---|",
        f"| time | {training:.2f} h of training ({settings['steps']} steps), {evaluation:.2f} h of evaluation "
        f"(its last session) | {recipe.hours:g} h |",
        f"| memory | {held} | {recipe.memory_gb:.1f} GB, activations and kept examples on top |",
        f"| an edit | {report.runs[-1].seconds_per_edit:.3f} s | |",
        "",
        f"The time was expected so: {recipe.time_basis}",
    ]


def call(recipe: Recipe, out: Path, used: Ingredients, seed: int, limit: int | None, max_steps: int | None) -> str:
    """The call in Python that does the same again."""
    given = {name: value for name, value in used.to_json().items() if value != getattr(recipe, name)}
    options = {**given, "seed": seed, "limit": limit, "max_steps": max_steps}
    told = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
    return f"run_recipe(load_recipe({recipe.name!r}), {str(out)!r}{told})"
