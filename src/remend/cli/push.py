"""``remend push``."""

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
    to: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Where on the hub; it is made if it is not there.")],
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What remend evaluate or guard wrote with --json, for the card."),
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="As the hub abbreviates it: apache-2.0 …")] = None,
    base: Annotated[str | None, typer.Option(help="The base model's hub id, if the edit names it otherwise.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    card: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only write the card here, to be looked at; publish nothing.")
    ] = None,
) -> None:
    """Publish an edit or an editor on the Hugging Face hub, with a card that says what it is and how it was judged."""
    from remend.apps.hub import push as publish
    from remend.apps.hub import render_model_card
    from remend.apps.hub.push import check_repo_name
    from remend.serialization import read_verified_manifest, write_text

    console, found = Console(), figures(report)
    check_repo_name(to)
    if card is not None:
        write_text(card, render_model_card(read_verified_manifest(folder), to, licence, base, found))
        console.print(f"the card is in [bold]{plain(str(card))}[/]; nothing was published")
        return
    where = publish(folder, to, license_id=licence, base=base, evaluation=found, private=private or None)
    console.print(f"published: {plain(where)}; others take it as hf:{plain(to)}", soft_wrap=True)


def figures(report: Path | None) -> list[tuple[str, str]]:
    """What a report or a verdict says, in lines for a card.

    Raises:
        FileError: the file is neither.
        ConfigError: it is of an evaluation of several numbers of edits.
    """
    from remend.evaluation.reports.schema import read_report

    if report is None:
        return []
    try:
        content = json.loads(report.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(
            f"cannot read {report} ({error}); name what remend evaluate or guard wrote with --json"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("checks"), list):
        return _verdict(content, report)
    read = read_report(report)
    if len(read.runs) > 1:
        raise ConfigError(f"{report} is of {len(read.runs)} numbers of edits: give a report of one")
    rows = [("requests", f"{len(read.runs[0].cases)} of {read.data}, {read.protocol}")]
    for name, modes in read.metrics().items():
        if "generated" in modes:
            own = modes["generated"]
            rows.append((name.replace("_", " "), f"{own.mean:.3f} ({own.ci95[0]:.3f} – {own.ci95[1]:.3f})"))
    return rows


def _verdict(content: dict[str, object], report: Path) -> list[tuple[str, str]]:
    from remend.apps.acceptance.result import CHECK_TITLES, AcceptanceCheck

    checks = content["checks"]
    assert isinstance(checks, list)
    try:
        found = [AcceptanceCheck(**{**own, "failed": ()}) for own in checks]
        rows = [(CHECK_TITLES[check.name], check.description.partition(": ")[2]) for check in found]
    except (TypeError, KeyError, ValueError) as error:
        raise FileError(f"{report} is no verdict of remend guard ({error}): make it anew") from None
    return [("verdict", "accepted" if content.get("ok") is True else "not accepted"), *rows]
