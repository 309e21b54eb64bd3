"""FEVER (Thorne et al., 2018): claims with labels, and its symmetric twins (Schuster et al., 2019)."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from remend.data.json_rows import JsonRow, json_reader
from remend.data.parsing import distinct_paraphrases
from remend.request import EditRequest, Probe, TextPair

_LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
_TWIN_LABELS = _LABELS[:2]
"""The labels of the symmetric twins and of MEND's files."""


@json_reader(
    '{"id": …, "claim": …, "label": "SUPPORTS", "REFUTES" or "NOT ENOUGH INFO"}, with a text "evidence" in twins; or '
    'MEND\'s {"input": …, "output": [{"answer": "SUPPORTS" or "REFUTES"}], "filtered_rephrases": […]}'
)
def read(rows: Iterator[JsonRow]) -> Iterator[EditRequest]:
    """Yield requests that flip the labels of FEVER's claims, for a classifier.

    The target is drawn among the labels that are not the claim's own, by a generator seeded with the row: the same at
    every call. The subject is the Wikipedia page of the evidence that the claim names, where the file lists pages and
    it names one.

    Rows of MEND's files (``input``, ``output``) have paraphrases, and are labelled ``SUPPORTS`` or ``REFUTES``.

    Rows with a text ``evidence`` are the symmetric twins: the prompt is the pair of evidence and claim, labelled
    ``SUPPORTS`` or ``REFUTES``. Other rows with the same claim or the same evidence are near prompts, of kind
    ``same_claim`` or ``same_evidence``, with their own labels. All rows that are linked in this way share a subject, so
    that no split separates them.
    """
    twins = []
    for row in rows:
        if isinstance(row.content.get("evidence"), str):
            evidence, claim = row.text("evidence"), row.text("claim")
            twins.append(_Twin(evidence, claim, _read_label(row, "label", _TWIN_LABELS), row.name("id")))
        elif "input" in row.content:
            yield _parse_mend(row)
        else:
            yield _parse_claim(row)
    # Twins are far apart in the file, so it is read whole before the first of them is known with its neighbors.
    yield from _twin_requests(twins)


def _parse_claim(row: JsonRow) -> EditRequest:
    claim, label, number = row.text("claim"), _read_label(row, "label", _LABELS), row.name("id")
    titles = (_page_title(page) for page in row.texts_if_any("evidence_pages"))
    details: dict[str, Any] = {"ground_truth": label}
    return EditRequest(
        prompt=claim,
        target=_draw_other_label(label, _LABELS, f"{number} {claim}"),
        subject=next((title for title in titles if title.casefold() in claim.casefold()), None),
        id=number,
        **details,
    )


def _parse_mend(row: JsonRow) -> EditRequest:
    claim, number, outputs = row.text("input"), row.name("id"), row.rows("output")
    if not outputs:
        raise row.error("output is an empty list")
    label = _read_label(outputs[0], "answer", _TWIN_LABELS)
    details: dict[str, Any] = {"ground_truth": label}
    return EditRequest(
        prompt=claim,
        target=_draw_other_label(label, _TWIN_LABELS, f"{number} {claim}"),
        id=number,
        paraphrases=distinct_paraphrases(row, claim, row.texts_if_any("filtered_rephrases")),
        **details,
    )


def _read_label(row: JsonRow, key: str, allowed: Sequence[str]) -> str:
    if (label := row.text(key)) not in allowed:
        raise row.error(f"{key} should be {' or '.join(allowed)}, not {label!r}")
    return label


def _draw_other_label(label: str, labels: Sequence[str], seed: str) -> str:
    # A generator for each row, so that a row's target does not depend on the rows before it or on what is left out.
    return random.Random(f"fever {seed}").choice([other for other in labels if other != label])


def _page_title(page: str) -> str:
    """Return the title of a page as words: ``Soul_Food_-LRB-film-RRB-`` is Soul Food."""
    return re.sub(r"\s*-LRB-.*?-RRB-", "", page.replace("_", " ")).strip() or page


@dataclass(frozen=True)
class _Twin:
    """A row of the symmetric twins."""

    evidence: str
    claim: str
    label: str
    name: str | int | None


def _twin_requests(twins: Sequence[_Twin]) -> Iterator[EditRequest]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, twin in enumerate(twins):
        groups[f"evidence {twin.evidence}"].append(number)
        groups[f"claim {twin.claim}"].append(number)
    # Two rows with the same claim or evidence must not be on two sides of a split, nor what is linked through them.
    components = _connected_components(len(twins), list(groups.values()))
    for number, twin in enumerate(twins):
        near = [
            _near_probe(twins[neighbor], kind)
            for kind, key in (("same_claim", f"claim {twin.claim}"), ("same_evidence", f"evidence {twin.evidence}"))
            for neighbor in groups[key]
            if neighbor != number
        ]
        details: dict[str, Any] = {"ground_truth": twin.label}
        yield EditRequest(
            prompt=TextPair(twin.evidence, twin.claim),
            target=_draw_other_label(twin.label, _TWIN_LABELS, f"{twin.name} {twin.claim}"),
            subject=twins[components[number]].claim,
            id=twin.name,
            near=tuple(near),
            **details,
        )


def _connected_components(count: int, groups: Sequence[Sequence[int]]) -> list[int]:
    """Return for each of ``count`` items the lowest item that groups link it to, over any number of steps."""
    components = list(range(count))
    for members in groups:
        lowest = min(components[member] for member in members)
        joined = {components[member] for member in members}
        components = [lowest if component in joined else component for component in components]
    return components


def _near_probe(twin: _Twin, kind: str) -> Probe:
    details: dict[str, Any] = {"kind": kind}
    return Probe(prompt=TextPair(twin.evidence, twin.claim), target=twin.label, **details)
