"""The results on a model card: read from a report of ``remend evaluate`` or the result of an acceptance check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from remend.apps.acceptance.check import CHECK_TITLES, AcceptanceCheck
from remend.errors import ConfigError, FileError
from remend.evaluation.reports.metric_titles import main_value, title_of
from remend.evaluation.reports.report_reader import read_report
from remend.evaluation.summary import Summary

ON_ORDINARY_TEXT = ("elsewhere", "kl_elsewhere", "perplexity_ratio")
"""The metrics of ordinary text, which cards show beside those of answers."""


def evaluation_rows(report: Path | None) -> list[tuple[str, str]]:
    """Return the results in a report of remend evaluate or guard, as names and values for a card.

    Raises:
        FileError: the file is neither.
        ConfigError: the report evaluates several numbers of edits.
    """
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
        if "generated" in modes or name in ON_ORDINARY_TEXT:
            rows.append((title_of(name), _with_interval(main_value(modes))))
    return rows


def _with_interval(value: Summary) -> str:
    return f"{value.mean:.3f} ({value.ci95[0]:.3f} – {value.ci95[1]:.3f})"


def _acceptance_rows(content: dict[str, object], report: Path) -> list[tuple[str, str]]:
    """Return the rows of an acceptance result.

    Raises:
        FileError: it is malformed.
    """
    checks = content["checks"]
    assert isinstance(checks, list)
    try:
        results = [AcceptanceCheck(**{**check, "failed": ()}) for check in checks]
        rows = [(CHECK_TITLES[check.name], check.description.partition(": ")[2]) for check in results]
        elsewhere: Any = content.get("elsewhere", {})  # older results lack it
        for name in ("divergence", "perplexity_ratio"):
            if elsewhere.get(name) is not None:
                rows.append((f"{name.replace('_', ' ')} on ordinary text", _with_interval(Summary(**elsewhere[name]))))
    except (AttributeError, TypeError, KeyError, ValueError, OverflowError) as error:
        raise FileError(f"{report} is not a result of remend guard ({error}): run remend guard --json again") from None
    return [("verdict", "accepted" if content.get("ok") is True else "not accepted"), *rows]
