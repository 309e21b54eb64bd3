"""The tables as markdown and as one HTML page: our figures beside the paper's, and whether its findings hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from remend.serialization import write_json, write_text

from .cells import METHODS
from .drawing import Axis, chart
from .results import Results
from .tables import SLACK, Table

TRIAL = "A quick run: it shows that everything works, and says nothing of any editor."
VERDICTS = {True: "holds", False: "does not hold", None: "not measured"}


@dataclass(frozen=True)
class Row:
    """A method's figures: for each column ours, then the paper's."""

    title: str
    method: str
    cells: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Filled:
    """A table with what was measured; of cells that failed, why; and pictures of it, by world."""

    table: Table
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    findings: tuple[tuple[str, str], ...]
    failures: Mapping[str, str]
    pictures: Mapping[str, str]
    command: str


def fill(table: Table, results: Results, command: str) -> Filled:
    """A table with its figures; of worlds that there are.

    Args:
        table: which.
        results: what was measured.
        command: what computes it again.
    """
    worlds = results.workshop.worlds
    columns = table.columns_in(worlds)
    several = any(edits > 1 for _, edits in columns)
    head = tuple(f"{world}, {edits}" if several else _headed(results, world) for world, edits in columns)
    rows = tuple(
        Row(METHODS[method].title, method, tuple(_cell(table, results, method, w, n) for w, n in columns))
        for method in table.methods
    )
    findings = tuple((one.says, VERDICTS[one.holds(results)]) for one in table.findings)
    failures: dict[str, str] = {}
    for method in table.methods:
        for world, edits in columns:
            failures |= results.failures(world, method, edits)
    return Filled(table, head, rows, findings, failures, draw_together(table, results), command)


def _headed(results: Results, world: str) -> str:
    """A world's name, with what it stands for and the perplexity that its drawdown adds to."""
    own, perplexity = results.workshop.worlds[world], results.perplexity(world)
    return f"{world} ({own.paper or own.what}{'' if perplexity is None else f', perplexity {perplexity:.0f}'})"


def _cell(table: Table, results: Results, method: str, world: str, edits: int) -> tuple[str, str, str]:
    """Success and drawdown as measured, near locality, and the paper's figures."""
    paper = table.paper.get((method, world, edits), "")
    if results.failures(world, method, edits):
        return "failed", "", paper
    success = results.get(world, method, results.workshop.worlds[world].success, edits)
    drawdown = results.get(world, method, results.workshop.worlds[world].drawdown, edits)
    near = results.get(world, method, "locality_near", edits)
    ours = "" if success is None else f"{success.text()} / {'' if drawdown is None else drawdown.text()}"
    return ours, "" if near is None else near.text(), paper


def write(
    folder: Path, filled: Sequence[Filled], memory: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Write ``tables.md``, ``tables.html`` and ``tables.json`` into a folder, each whole or not at all."""
    write_text(folder / "tables.md", markdown(filled, memory, about))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = Path(__file__).with_name("tables.html.j2").read_text(encoding="utf-8")
    environment.filters["code"] = _with_code
    drawn = Markup(draw_memory(memory)) if any(own["added"] for own in memory) else ""
    page = environment.from_string(source).render(
        filled=filled, memory=memory, about=about, picture=drawn, trial=TRIAL, slack=SLACK
    )
    write_text(folder / "tables.html", page)
    write_json(
        folder / "tables.json", {"about": dict(about), "tables": [_json(own) for own in filled], "memory": list(memory)}
    )


def _with_code(text: str) -> Markup:
    """A text whose parts between backticks are code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(own) if n % 2 else own for n, own in enumerate(parts))


def _json(filled: Filled) -> dict[str, Any]:
    return {
        "table": filled.table.name,
        "command": filled.command,
        "columns": list(filled.head),
        "rows": {row.method: [_named(cell) for cell in row.cells] for row in filled.rows},
        "findings": dict(filled.findings),
        "failures": dict(filled.failures),
    }


def _named(cell: tuple[str, str, str]) -> dict[str, str]:
    return dict(zip(("ours", "near", "paper"), cell, strict=True))


def markdown(filled: Sequence[Filled], memory: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """All tables as markdown."""
    lines = [
        "# The paper's tables in miniature",
        "",
        *([f"**{TRIAL}**", ""] if about["trial"] else []),
        "Edit success (Eq. 1, free decoding; of passages, ten tokens that were sampled, the share of tokens that are "
        "the first choice) / drawdown (of passages, what is added to the perplexity of other text); in brackets "
        "locality at near prompts; *in italics the paper's figures*. "
        f"Means over {about['seeds']} seeds, each with its own training and its own {about['requests']} test requests, "
        f"or all that there are ({about['many']} or one batch of several edits at once), ± half a 95 % interval of the "
        f"seeds' means (Student's t). Of findings, differences below {SLACK} count as none. {about['machine']}.",
    ]
    for own in filled:
        lines += ["", f"## {own.table.heading}: {own.table.title}", ""]
        lines += [f"| | {' | '.join(own.head)} |", f"|---|{'---|' * len(own.head)}"]
        for row in own.rows:
            cells = [
                f"{ours}{f' ({near})' if near else ''}{f'<br>*{paper}*' if paper else ''}"
                for ours, near, paper in row.cells
            ]
            lines.append(f"| {row.title} | {' | '.join(cells)} |")
        lines += ["", *(f"- {verdict}: {says}" for says, verdict in own.findings)]
        lines += [f"- `{cell}` failed: {why}" for cell, why in own.failures.items()]
        lines += ["", own.table.note] if own.table.note else []
        lines += [
            "",
            f"`{own.command}`; one cell: `{own.command.split(' --tables')[0]} --cell WORLD/METHOD/EDITS/SEED`",
        ]
    if memory:
        lines += ["", "## Figures 3 and 4: memory of training", ""]
        lines += ["| parameters | method | GB of the process | GB added by training |", "|---|---|---|---|"]
        lines += [
            f"| {own['parameters'] / 1e6:.1f} million | {own['method']} | {own['peak']:.2f} | {own['added']:.2f} |"
            for own in memory
        ]
    return "\n".join(lines) + "\n"


def draw_memory(memory: Sequence[Mapping[str, Any]]) -> str:
    """Memory that training adds, against the size of the model, as SVG."""
    sizes = sorted({own["parameters"] / 1e6 for own in memory})
    most = max(own["added"] for own in memory)
    lines = {
        method: [(own["parameters"] / 1e6, own["added"]) for own in memory if own["method"] == method]
        for method in dict.fromkeys(own["method"] for own in memory)
    }
    across = Axis("million parameters of the model", [(0.0, "0"), *((size, f"{size:.0f}") for size in sizes)])
    up = Axis("GB that training adds", [(most * part / 4, f"{most * part / 4:.2f}") for part in range(5)])
    return chart("memory of training against the model's size", lines, across, up)


def draw_together(table: Table, results: Results) -> dict[str, str]:
    """Edit success against the number of edits at once, as SVG: a picture for each world of which there are several."""
    found = {}
    for world in dict.fromkeys(world for world, _ in table.columns_in(results.workshop.worlds)):
        numbers = [edits for own, edits in table.columns if own == world]
        lines = {
            METHODS[method].title.replace("`", ""): [
                (edits, value) for edits in numbers if not math.isnan(value := results.success(world, method, edits))
            ]
            for method in table.methods
        }
        if len(numbers) > 1 and any(lines.values()):
            across = Axis("edits at once", [(edits, str(edits)) for edits in numbers], even=True)
            up = Axis("edit success", [(part / 4, f"{part / 4:.2f}") for part in range(5)])
            found[world] = chart(f"edit success of {world} against the number of edits", lines, across, up)
    return found
