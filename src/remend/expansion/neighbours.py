"""What is near a request and must stay: the same of others, something else of the subject, the target elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from remend.data.edit_sets import SetItem
from remend.editors.locate_then_edit.common_questions import Frame, frames, next_tokens
from remend.expansion.implications import moved_questions
from remend.expansion.premise import Premise, short_answers
from remend.expansion.well_known import names_asked, suits
from remend.tasks.endings import asks

SURE_FROM = 0.2
"""The least probability of its first token with which an answer is one that should stay."""

UNRELATED = {
    "The opposite of hot is": "What is the opposite of hot?",
    "The first month of the year is": "What is the first month of the year?",
    "The currency of Japan is the": "What is the currency of Japan?",
}
"""What has nothing to do with any edit and follows its words, as a statement and as a question."""

_SENTENCE_END = re.compile(r"[.?!]\s")
_VERB = re.compile(r"\b(?:is|are|was|were|can|has been|have been)\b")


@dataclass(frozen=True)
class _Candidate:
    """A prompt that may be near.

    Attributes:
        kind: of what kind.
        made: how it was made.
        statement: the statement that tells how sure the model is of its answer.
        text: the prompt's text.
    """

    kind: str
    made: str
    statement: str
    text: str


def neighbours(premise: Premise, most: int) -> list[SetItem]:
    """Return prompts whose answers must stay: the kinds in turn, of each those first whose answers are the surest.

    Args:
        premise: what is asked.
        most: the most prompts.
    """
    kinds = (_same_relation, _same_subject, _target_elsewhere)
    of_kinds = [_surest(premise, list(candidates(premise)), most) for candidates in kinds]
    in_turn = chain.from_iterable(zip_longest(*of_kinds, _with_the_words_of_the_edit(premise)))
    return list(islice((item for item in in_turn if item is not None), most))


def _same_relation(premise: Premise) -> Iterator[_Candidate]:
    """Yield the request's prompt about well-known other subjects."""
    if premise.statement is None:
        return
    subject = premise.subject.casefold()
    for name in names_asked(premise.question, premise.kind):
        if name.casefold() not in subject and subject not in name.casefold():
            statement = premise.statement.replace("{}", name)
            yield _Candidate("same relation", "another subject", statement, premise.about(name))


def _same_subject(premise: Premise) -> Iterator[_Candidate]:
    """Yield what else is asked of the subject."""
    yield from _common(premise, premise.subject, premise.kind, "same subject")


def _target_elsewhere(premise: Premise) -> Iterator[_Candidate]:
    """Yield what is asked of the target."""
    yield from _common(premise, premise.request.target, premise.target_kind, "about the target")


def _common(premise: Premise, name: str, of_kind: str | None, kind: str) -> Iterator[_Candidate]:
    """Yield what is commonly asked of a name of some kind."""
    questions = {frame.question: frame for frame in reversed(frames("questions"))}
    moved = moved_questions(premise)
    for frame in frames("statements"):
        asked: Frame | None = questions.pop(frame.question, None) if asks(premise.request.prompt) else frame
        if asked is not None and frame.question not in moved and suits(frame.question, of_kind):
            yield _Candidate(kind, "a common question", frame.about(name), asked.about(name))


def _surest(premise: Premise, candidates: Sequence[_Candidate], most: int) -> list[SetItem]:
    """Return the candidates of one kind of whose answers the model is sure, first those that answer with the target."""
    if not candidates:
        return []
    task, target = premise.task, premise.request.target
    sure, first = next_tokens(task, [candidate.statement for candidate in candidates]).max(1)
    (of_target,) = {task.encode(candidates[0].statement, target).target[0]}
    order = sorted(range(len(candidates)), key=lambda i: (int(first[i]) != of_target, -float(sure[i])))
    chosen = [i for i in order if sure[i] >= SURE_FROM][:most]
    answers = short_answers(task, [candidates[i].statement for i in chosen])
    return [
        SetItem(
            item="near",
            kind=f"{candidates[i].kind}, same answer" if int(first[i]) == of_target else candidates[i].kind,
            made=candidates[i].made,
            sure=1.0,
            prompt=premise.in_form(candidates[i].text),
            answer=answer or None,
        )
        for i, answer in zip(chosen, answers, strict=True)
    ]


def _with_the_words_of_the_edit(premise: Premise) -> Iterator[SetItem]:
    """Yield unrelated prompts after the words of the edit, and the request's statement denied."""
    if premise.statement is None:
        return
    own = premise.statement.replace("{}", premise.subject)
    if not asks(premise.request.prompt):
        # What the target is followed by: else an edit about the target, such as the reverse question, would be heard.
        text = f"{own} {premise.request.target}"
        yield SetItem(item="near", kind="after the edit's words", made="what goes on there", prompt=text)
    for statement, question in UNRELATED.items():
        text = f"{own} {premise.request.target}. {question if asks(premise.request.prompt) else statement}"
        yield SetItem(
            item="near", kind="after the edit's words", made="an unrelated prompt", prompt=premise.in_form(text)
        )
    yield from denials(premise)


def denials(premise: Premise) -> Iterator[SetItem]:
    """Yield the request's statement denied, where it is one sentence with a verb that *not* can follow."""
    if premise.statement is None or asks(premise.request.prompt) or _SENTENCE_END.search(premise.statement):
        return
    denied, changed = _VERB.subn(_denied, premise.statement, count=1)
    if changed:
        prompt = denied.replace("{}", premise.subject)
        yield SetItem(item="near", kind="denial", made="the statement denied", prompt=prompt)


def _denied(verb: re.Match[str]) -> str:
    first, *rest = verb[0].split()
    return " ".join([first, "not", *rest])
