"""Functions that the readers of published data sets share: templates, answers with aliases, edits of nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from remend.data.json_rows import JsonRow
from remend.data.json_stream import shorten
from remend.request import EditRequest, Probe

NO_TARGET = "edits without a target"
TRUE_TARGET = "edits to the answer that is true already"
NO_ANSWER = "probes without an answer"
UNPAIRED = "questions whose answers must stay, beyond one for each edit"
DUPLICATE_PHRASING = "phrasings given twice"


def normalize(text: str) -> str:
    """Return a text for comparisons: in lower case, with single spaces between words."""
    return " ".join(text.casefold().split())


def fill_template(row: JsonRow, key: str, subject: str) -> str:
    """Return the template at ``key`` with the subject in place of its ``{}``.

    Raises:
        RequestError: it has no ``{}``.
    """
    template = row.text(key)
    if "{}" not in template:
        raise row.error(f"{key} should have {{}} where the subject stands, not {shorten(template)}")
    # Not str.format: subjects and templates of published files hold other braces.
    return template.replace("{}", subject)


def is_edit(row: JsonRow, target: str, truths: Iterable[str]) -> bool:
    """Tell whether the target changes anything; if not, the reason is reported to the row's ``skip``."""
    if not target.strip():
        row.skip(NO_TARGET)
        return False
    if normalize(target) in map(normalize, truths):
        row.skip(TRUE_TARGET)
        return False
    return True


def distinct_paraphrases(row: JsonRow, prompt: str, paraphrases: Iterable[str]) -> tuple[str, ...]:
    """Return the paraphrases that differ from the prompt and from each other."""
    distinct = {normalize(prompt): prompt}
    for paraphrase in paraphrases:
        if normalize(paraphrase) in distinct:
            row.skip(DUPLICATE_PHRASING)
        distinct.setdefault(normalize(paraphrase), paraphrase)
    return tuple(distinct.values())[1:]


def make_probes(
    row: JsonRow, prompt: str, accepted: Sequence[str], kind: str | None = None, **details: Any
) -> list[Probe]:
    """Return a probe with the first accepted answer as target and the rest as ``aliases``; none without answers."""
    answers = [answer for answer in accepted if answer.strip()]
    if not answers:
        row.skip(NO_ANSWER)
        return []
    details = {"kind": kind, "aliases": aliases(answers), **details}
    return [Probe(prompt=prompt, target=answers[0], **{key: value for key, value in details.items() if value})]


def aliases(accepted: Sequence[str]) -> list[str]:
    """Return the accepted answers after the first, without those that differ from another only in case or spaces."""
    # Reversed, so that the first of several spellings is the one that stays.
    first_spelling = {normalize(answer): answer for answer in reversed(accepted)}
    return [
        answer
        for answer in dict.fromkeys(accepted)
        if first_spelling[normalize(answer)] == answer and answer != accepted[0]
    ]


def make_request(prompt: str, target: str, truths: Sequence[str] = (), **details: Any) -> EditRequest:
    """Return a request with the first true answer as ``ground_truth`` and the others as ``ground_truth_aliases``."""
    truths = [truth for truth in truths if truth.strip()]
    truth = {"ground_truth": truths[0], "ground_truth_aliases": aliases(truths)} if truths else {}
    # Absent keys stay absent, so that a converted file holds no nulls and empty lists.
    present = {key: value for key, value in {**truth, **details}.items() if value is not None and value != []}
    return EditRequest(prompt=prompt, target=target, **present)
