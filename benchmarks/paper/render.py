"""The tables as Markdown, HTML and JSON: our figures beside the paper's, and whether its findings hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from remend.saved_folders import write_json, write_text

from .charts import Axis, line_chart
from .findings import TOLERANCE
from .methods import METHODS
from .results import Results
from .table_definitions import Table

TRIAL_NOTE = "A quick run: it shows that everything works, and says nothing of any editor."
VERDICTS = {True: "holds", False: "does not hold", None: "not measured"}


@dataclass(frozen=True)
class TableRow:
    """The figures of a method: for each column success and drawdown, near locality, and the paper's figures."""

    title: str
    method: str
    cells: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class FilledTable:
    """A table with its figures.

    Attributes:
        table: which.
        head: the heading of each column.
        rows: one for each method.
        findings: the statements with their verdicts.
        failures: why cells failed, by the id of the cell.
        charts: SVG charts by testbed.
        command: the command that computes the table again.
    """

    table: Table
    head: tuple[str, ...]
    rows: tuple[TableRow, ...]
    findings: tuple[tuple[str, str], ...]
    failures: Mapping[str, str]
    charts: Mapping[str, str]
    command: str


def fill(table: Table, results: Results, command: str) -> FilledTable:
    """Fill a table with the figures that were measured; it has a column for each testbed that is there.

    Args:
        table: which.
        results: the figures.
        command: the command that computes the table again.
    """
    columns = table.columns_in(results.testbeds)
    by_edits = any(edits > 1 for _, edits in columns)
    head = tuple(f"{testbed}, {edits}" if by_edits else _column_heading(results, testbed) for testbed, edits in columns)
    rows = tuple(
        TableRow(
            METHODS[method].title,
            method,
            tuple(_cell(table, results, method, testbed, edits) for testbed, edits in columns),
        )
        for method in table.methods
    )
    findings = tuple((finding.text, VERDICTS[finding.holds(results)]) for finding in table.findings)
    failures: dict[str, str] = {}
    for method in table.methods:
        for testbed, edits in columns:
            failures |= results.failures(testbed, method, edits)
    return FilledTable(table, head, rows, findings, failures, charts_by_edits(table, results), command)


def _column_heading(results: Results, name: str) -> str:
    """Return a testbed's name with its task, and the unedited model's perplexity where drawdown is of perplexity."""
    testbed, perplexity = results.testbeds[name], results.perplexity(name)
    suffix = "" if perplexity is None else f", perplexity {perplexity:.0f}"
    return f"{name} ({testbed.paper or testbed.description}{suffix})"


def _cell(table: Table, results: Results, method: str, testbed: str, edits: int) -> tuple[str, str, str]:
    """Return success and drawdown as measured, near locality, and the paper's figures."""
    published = table.paper.get((method, testbed, edits), "")
    if results.failures(testbed, method, edits):
        return "failed", "", published
    success = results.get(testbed, method, results.testbeds[testbed].success, edits)
    drawdown = results.get(testbed, method, results.testbeds[testbed].drawdown, edits)
    near = results.get(testbed, method, "locality_near", edits)
    measured = "" if success is None else f"{success.text()} / {'' if drawdown is None else drawdown.text()}"
    return measured, "" if near is None else near.text(), published


def write(
    folder: Path, tables: Sequence[FilledTable], memory: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Write ``tables.md``, ``tables.html`` and ``tables.json`` into a folder, each whole or not at all."""
    write_text(folder / "tables.md", markdown(tables, memory, about))
    write_text(folder / "tables.html", html(tables, memory, about))
    content = {"about": dict(about), "tables": [_to_json(table) for table in tables], "memory": list(memory)}
    write_json(folder / "tables.json", content)


def _to_json(filled: FilledTable) -> dict[str, Any]:
    keys = ("ours", "near", "paper")
    return {
        "table": filled.table.name,
        "command": filled.command,
        "columns": list(filled.head),
        "rows": {row.method: [dict(zip(keys, cell, strict=True)) for cell in row.cells] for row in filled.rows},
        "findings": dict(filled.findings),
        "failures": dict(filled.failures),
    }


def html(tables: Sequence[FilledTable], memory: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Return all tables as one HTML page that needs no other file."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = code_spans
    template = Path(__file__).with_name("tables.html.j2").read_text(encoding="utf-8")
    chart = Markup(memory_chart(memory)) if any(row["added"] for row in memory) else ""
    return environment.from_string(template).render(
        tables=tables, memory=memory, about=about, memory_chart=chart, trial_note=TRIAL_NOTE, tolerance=TOLERANCE
    )


def code_spans(text: str) -> Markup:
    """Return a text as HTML in which the parts between backticks are code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def markdown(tables: Sequence[FilledTable], memory: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    lines = [
        "# The paper's tables in miniature",
        "",
        *([f"**{TRIAL_NOTE}**", ""] if about["trial"] else []),
        "Edit success (Eq. 1, free decoding; of passages, ten tokens that were sampled, the share of tokens that are "
        "the first choice) / drawdown (of passages, what is added to the perplexity of other text); in brackets "
        "locality at near prompts; *in italics the paper's figures*. "
        f"Means over {about['seeds']} seeds, each with its own training and its own {about['requests']} test requests, "
        f"or all that there are ({about['many']} or one batch of several edits at once), ± half a 95 % interval of the "
        f"seeds' means (Student's t). Of findings, differences below {TOLERANCE} count as none. {about['machine']}.",
    ]
    for filled in tables:
        lines += ["", f"## {filled.table.heading}: {filled.table.title}", ""]
        lines += [f"| | {' | '.join(filled.head)} |", f"|---|{'---|' * len(filled.head)}"]
        for row in filled.rows:
            cells = [
                f"{measured}{f' ({near})' if near else ''}{f'<br>*{published}*' if published else ''}"
                for measured, near, published in row.cells
            ]
            lines.append(f"| {row.title} | {' | '.join(cells)} |")
        lines += ["", *(f"- {verdict}: {text}" for text, verdict in filled.findings)]
        lines += [f"- `{cell}` failed: {reason}" for cell, reason in filled.failures.items()]
        lines += ["", filled.table.note] if filled.table.note else []
        command = filled.command.split(" --tables")[0]
        lines += ["", f"`{filled.command}`; one cell: `{command} --cell TESTBED/METHOD/EDITS/SEED`"]
    if memory:
        lines += ["", "## Figures 3 and 4: memory of training", ""]
        lines += ["| parameters | method | GB of the process | GB added by training |", "|---|---|---|---|"]
        lines += [
            f"| {row['parameters'] / 1e6:.1f} million | {row['method']} | {row['peak']:.2f} | {row['added']:.2f} |"
            for row in memory
        ]
    return "\n".join(lines) + "\n"


def memory_chart(memory: Sequence[Mapping[str, Any]]) -> str:
    """Draw the memory that training adds against the size of the model."""
    sizes = sorted({row["parameters"] / 1e6 for row in memory})
    highest = max(row["added"] for row in memory)
    lines = {
        method: [(row["parameters"] / 1e6, row["added"]) for row in memory if row["method"] == method]
        for method in dict.fromkeys(row["method"] for row in memory)
    }
    x = Axis("million parameters of the model", [(0.0, "0"), *((size, f"{size:.0f}") for size in sizes)])
    y = Axis("GB that training adds", [(highest * part / 4, f"{highest * part / 4:.2f}") for part in range(5)])
    return line_chart("memory of training against the model's size", lines, x, y)


def charts_by_edits(table: Table, results: Results) -> dict[str, str]:
    """Draw edit success against the number of edits at once, for each testbed with several numbers of edits."""
    charts = {}
    for testbed in dict.fromkeys(testbed for testbed, _ in table.columns_in(results.testbeds)):
        counts = [edits for name, edits in table.columns if name == testbed]
        lines = {
            METHODS[method].title.replace("`", ""): [
                (edits, value) for edits in counts if not math.isnan(value := results.success(testbed, method, edits))
            ]
            for method in table.methods
        }
        if len(counts) > 1 and any(lines.values()):
            x = Axis("edits at once", [(edits, str(edits)) for edits in counts], evenly_spaced=True)
            y = Axis("edit success", [(part / 4, f"{part / 4:.2f}") for part in range(5)])
            charts[testbed] = line_chart(f"edit success of {testbed} against the number of edits", lines, x, y)
    return charts
