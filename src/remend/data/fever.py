"""FEVER (Thorne et al., 2018): claims with labels, and its symmetric twins (Schuster et al., 2019)."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from remend.data.json_rows import Row, Skip, ignore, read_rows
from remend.data.parsing import others
from remend.request import EditRequest, Probe, TextPair

FORM = (
    '{"id": …, "claim": …, "label": "SUPPORTS", "REFUTES" or "NOT ENOUGH INFO"}, with a text "evidence" in twins; or '
    'MEND\'s {"input": …, "output": [{"answer": "SUPPORTS" or "REFUTES"}], "filtered_rephrases": […]}'
)
LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")


def read(path: Path, skip: Skip = ignore) -> Iterator[EditRequest]:
    """Requests that flip the labels of FEVER's claims, for a classifier.

    The target is drawn among the labels that are not the claim's own, by a generator seeded with the row: the same at
    every call. The subject is the Wikipedia page of the evidence that the claim names, where the file lists pages and
    it names one.

    Rows of MEND's files (``input``, ``output``) have paraphrases, and are labelled ``SUPPORTS`` or ``REFUTES``.

    Rows with a text ``evidence`` are the symmetric twins: the prompt is the pair of evidence and claim, labelled
    ``SUPPORTS`` or ``REFUTES``. Other rows with the same claim or the same evidence are near prompts, of kind
    ``same_claim`` or ``same_evidence``, with their own labels. All rows that are linked in this way share a subject, so
    that no split parts them; the file is read whole, since twins stand far apart in it.

    Raises:
        RequestError: the file cannot be read, or a row is broken; the message names it.
    """
    twins = []
    for row in read_rows(path, FORM, skip):
        if isinstance(row.content.get("evidence"), str):
            twins.append((row.text("evidence"), row.text("claim"), _label(row, "label", LABELS[:2]), row.name("id")))
        elif "input" in row.content:
            yield _mend(row)
        else:
            yield _request(row)
    yield from _twins(twins)


def _request(row: Row) -> EditRequest:
    claim, label, number = row.text("claim"), _label(row, "label", LABELS), row.name("id")
    pages = row.texts("evidence_pages") if row.has("evidence_pages") else []
    named = (_title(page) for page in pages)
    details: dict[str, Any] = {"ground_truth": label}
    return EditRequest(
        prompt=claim,
        target=_other(label, LABELS, f"{number} {claim}"),
        subject=next((title for title in named if title.casefold() in claim.casefold()), None),
        id=number,
        **details,
    )


def _mend(row: Row) -> EditRequest:
    claim, number, outputs = row.text("input"), row.name("id"), row.rows("output")
    if not outputs:
        raise row.error("output is an empty list")
    label = _label(outputs[0], "answer", LABELS[:2])
    details: dict[str, Any] = {"ground_truth": label}
    return EditRequest(
        prompt=claim,
        target=_other(label, LABELS[:2], f"{number} {claim}"),
        id=number,
        paraphrases=others(row, claim, row.texts("filtered_rephrases")),
        **details,
    )


def _label(row: Row, key: str, allowed: Sequence[str]) -> str:
    if (label := row.text(key)) not in allowed:
        raise row.error(f"{key} should be {' or '.join(allowed)}, not {label!r}")
    return label


def _other(label: str, labels: Sequence[str], seed: str) -> str:
    return random.Random(f"fever {seed}").choice([other for other in labels if other != label])


def _title(page: str) -> str:
    """A page's name in words: ``Soul_Food_-LRB-film-RRB-`` is Soul Food."""
    return re.sub(r"\s*-LRB-.*?-RRB-", "", page.replace("_", " ")).strip() or page


def _twins(rows: Sequence[tuple[str, str, str, str | int | None]]) -> Iterator[EditRequest]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, (evidence, claim, _, _) in enumerate(rows):
        groups[f"evidence {evidence}"].append(number)
        groups[f"claim {claim}"].append(number)
    subject = list(range(len(rows)))
    for members in groups.values():
        low = min(subject[member] for member in members)
        joined = {subject[member] for member in members}
        subject = [low if own in joined else own for own in subject]
    for number, (evidence, claim, label, name) in enumerate(rows):
        near = [
            _near(rows[other], kind)
            for kind, key in (("same_claim", f"claim {claim}"), ("same_evidence", f"evidence {evidence}"))
            for other in groups[key]
            if other != number
        ]
        details: dict[str, Any] = {"ground_truth": label}
        yield EditRequest(
            prompt=TextPair(evidence, claim),
            target=_other(label, LABELS[:2], f"{name} {claim}"),
            subject=rows[subject[number]][1],
            id=name,
            near=tuple(near),
            **details,
        )


def _near(row: tuple[str, str, str, str | int | None], kind: str) -> Probe:
    evidence, claim, label, _ = row
    details: dict[str, Any] = {"kind": kind}
    return Probe(prompt=TextPair(evidence, claim), target=label, **details)
