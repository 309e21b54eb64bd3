"""The tables as markdown and as one HTML page: our figures beside the paper's, and whether its findings hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from remend.reproduction.cells import METHODS
from remend.reproduction.results import Results
from remend.reproduction.tables import Table
from remend.storage import write_json, write_text

VERDICTS = {True: "holds", False: "does not hold", None: "not measured"}


@dataclass(frozen=True)
class Row:
    """A method's figures: for each column ours, then the paper's."""

    title: str
    method: str
    cells: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Filled:
    """A table with what was measured; of cells that failed, why."""

    table: Table
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    findings: tuple[tuple[str, str], ...]
    failures: Mapping[str, str]
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
    head = tuple(
        f"{world}, {edits}" if several else f"{world} ({worlds[world].paper or worlds[world].what})"
        for world, edits in columns
    )
    rows = tuple(
        Row(METHODS[method].title, method, tuple(_cell(table, results, method, w, n) for w, n in columns))
        for method in table.methods
    )
    findings = tuple((one.says, VERDICTS[one.holds(results)]) for one in table.findings)
    failures: dict[str, str] = {}
    for method in table.methods:
        for world, edits in columns:
            failures |= results.failures(world, method, edits)
    return Filled(table, head, rows, findings, failures, command)


def _cell(table: Table, results: Results, method: str, world: str, edits: int) -> tuple[str, str, str]:
    """Success and drawdown as measured, near locality, and the paper's figures."""
    paper = table.paper.get((method, world, edits), "")
    if results.failures(world, method, edits):
        return "failed", "", paper
    success = results.get(world, method, "edit_success", edits)
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
    source = resources.files("remend.reproduction").joinpath("tables.html.j2").read_text(encoding="utf-8")
    drawn = Markup(picture(memory)) if any(own["added"] for own in memory) else ""
    page = environment.from_string(source).render(filled=filled, memory=memory, about=about, picture=drawn)
    write_text(folder / "tables.html", page)
    write_json(
        folder / "tables.json", {"about": dict(about), "tables": [_json(own) for own in filled], "memory": list(memory)}
    )


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
        "Edit success (Eq. 1, free decoding) / drawdown; in brackets locality at near prompts; *in italics the paper's "
        f"figures*. Means over {about['seeds']} seeds, each with its own training and its own {about['requests']} test "
        f"requests ({about['many']} of several edits at once), ± half a 95 % interval of the seeds' means (Student's "
        f"t). {about['machine']}.",
    ]
    for own in filled:
        lines += ["", f"## Table {own.table.name}: {own.table.title}", ""]
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


def picture(memory: Sequence[Mapping[str, Any]]) -> str:
    """Memory that training adds, against the size of the model, as SVG."""
    width, height, left, bottom = 560, 300, 60, 40
    most = max(own["added"] for own in memory) * 1.1
    largest = max(own["parameters"] for own in memory)

    def place(own: Mapping[str, Any]) -> tuple[float, float]:
        x = left + (width - left - 110) * own["parameters"] / largest
        return x, (height - bottom) * (1 - own["added"] / most)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="memory of training against the model\'s size">',
        f'<path d="M{left} 0V{height - bottom}H{width - 100}" fill="none" stroke="currentColor"/>',
        f'<text x="{left}" y="{height - 8}">0</text>',
        f'<text x="{width - 190}" y="{height - 8}">{largest / 1e6:.0f} million parameters</text>',
        f'<text x="4" y="14">{most:.1f} GB</text>',
    ]
    for colour, method in zip(
        ("#c4314b", "#b7791f", "#2f6fd0"), dict.fromkeys(own["method"] for own in memory), strict=False
    ):
        points = [place(own) for own in memory if own["method"] == method]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        x, y = points[-1]
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{method}</text>')
    return "".join([*parts, "</svg>"])
