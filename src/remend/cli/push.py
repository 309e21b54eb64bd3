"""``remend push``: publish a saved edit or editor on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from remend.cli.escaping import plain
from remend.errors import ConfigError, FileError


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved edit or editor.")],
    to: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="The hub repository; it is created if it does not exist.")
    ],
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A report that remend evaluate or guard wrote with --json, for the card."),
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="The hub's identifier of the license: apache-2.0 …")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model's hub id, if the edit has another name for it.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    card: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only write the card to this file, and publish nothing.")
    ] = None,
) -> None:
    """Publish an edit or an editor on the Hugging Face hub, with a model card."""
    from remend.apps.hub import push as publish
    from remend.apps.hub import render_model_card
    from remend.apps.hub.push import check_repo_name
    from remend.serialization import read_verified_manifest, write_text

    console, evaluation = Console(), evaluation_rows(report)
    check_repo_name(to)
    if card is not None:
        write_text(card, render_model_card(read_verified_manifest(folder), to, license_id, base, evaluation))
        console.print(f"the card was written to [bold]{plain(str(card))}[/]; nothing was published")
        return
    url = publish(folder, to, license_id=license_id, base=base, evaluation=evaluation, private=private or None)
    console.print(f"published: {plain(url)}; others load it as hf:{plain(to)}", soft_wrap=True)


def evaluation_rows(report: Path | None) -> list[tuple[str, str]]:
    """Return the results in a report of remend evaluate or guard, as names and values for a card.

    Raises:
        FileError: the file is neither.
        ConfigError: the report evaluates several numbers of edits.
    """
    from remend.evaluation.reports.report_reader import read_report

    if report is None:
        return []
    try:
        content = json.loads(report.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(
            f"cannot read {report} ({error}); give a report that remend evaluate or guard wrote with --json"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("checks"), list):
        return _acceptance_rows(content, report)
    evaluated = read_report(report)
    if len(evaluated.runs) > 1:
        raise ConfigError(f"{report} evaluates {len(evaluated.runs)} numbers of edits: give a report of one")
    rows = [("requests", f"{len(evaluated.runs[0].cases)} of {evaluated.data}, {evaluated.protocol}")]
    for name, modes in evaluated.metrics().items():
        if "generated" in modes:
            value = modes["generated"]
            rows.append((name.replace("_", " "), f"{value.mean:.3f} ({value.ci95[0]:.3f} – {value.ci95[1]:.3f})"))
    return rows


def _acceptance_rows(content: dict[str, object], report: Path) -> list[tuple[str, str]]:
    """Return the rows of an acceptance result.

    Raises:
        FileError: it is malformed.
    """
    from remend.apps.acceptance.check import CHECK_TITLES, AcceptanceCheck

    checks = content["checks"]
    assert isinstance(checks, list)
    try:
        results = [AcceptanceCheck(**{**check, "failed": ()}) for check in checks]
        rows = [(CHECK_TITLES[check.name], check.description.partition(": ")[2]) for check in results]
    except (TypeError, KeyError, ValueError) as error:
        raise FileError(f"{report} is not a result of remend guard ({error}): run remend guard --json again") from None
    return [("verdict", "accepted" if content.get("ok") is True else "not accepted"), *rows]
