"""What all readers of published data sets do alike: fill templates, take answers with aliases, leave out no-edits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from remend.data.json_rows import Row, short
from remend.request import EditRequest, Probe

NO_TARGET = "edits without a target"
TRUE_TARGET = "edits to the answer that is true already"
NO_ANSWER = "probes without an answer"
DOUBLE = "phrasings given twice"


def alike(text: str) -> str:
    """A text as it is compared with another: letters' case and the amount of space between words make no difference."""
    return " ".join(text.casefold().split())


def filled(template: Row, key: str, subject: str) -> str:
    """The template at ``key`` with the subject in place of its ``{}``.

    Raises:
        RequestError: it has no ``{}``.
    """
    text = template.text(key)
    if "{}" not in text:
        raise template.error(f"{key} should have {{}} where the subject stands, not {short(text)}")
    return text.replace("{}", subject)


def is_edit(row: Row, target: str, truths: Iterable[str]) -> bool:
    """Whether there is something to change; else the row is left out, and why is told."""
    if not target.strip():
        row.skip(NO_TARGET)
        return False
    if alike(target) in map(alike, truths):
        row.skip(TRUE_TARGET)
        return False
    return True


def others(row: Row, prompt: str, phrasings: Iterable[str]) -> tuple[str, ...]:
    """The phrasings that differ from the prompt and from each other."""
    kept = {alike(prompt): prompt}
    for phrasing in phrasings:
        if alike(phrasing) in kept:
            row.skip(DOUBLE)
        kept.setdefault(alike(phrasing), phrasing)
    return tuple(kept.values())[1:]


def probe(row: Row, prompt: str, accepted: Sequence[str], kind: str | None = None, **details: Any) -> list[Probe]:
    """A probe whose target is the first accepted answer, the others in ``aliases``; none if there is no answer."""
    answers = [answer for answer in accepted if answer.strip()]
    if not answers:
        row.skip(NO_ANSWER)
        return []
    named = {"kind": kind, "aliases": aliases(answers), **details}
    return [Probe(prompt=prompt, target=answers[0], **{key: value for key, value in named.items() if value})]


def aliases(accepted: Sequence[str]) -> list[str]:
    """The other accepted answers, without what is the first in other letters."""
    kept = {alike(answer): answer for answer in reversed(accepted)}
    return [answer for answer in dict.fromkeys(accepted) if kept[alike(answer)] == answer and answer != accepted[0]]


def request(prompt: str, target: str, truths: Sequence[str] = (), **known: Any) -> EditRequest:
    """A request that keeps the true answer as ``ground_truth`` and others that are accepted as its aliases."""
    truths = [truth for truth in truths if truth.strip()]
    true = {"ground_truth": truths[0], "ground_truth_aliases": aliases(truths)} if truths else {}
    kept = {key: value for key, value in {**true, **known}.items() if value is not None and value != []}
    return EditRequest(prompt=prompt, target=target, **kept)
