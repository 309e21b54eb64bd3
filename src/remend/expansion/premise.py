"""``Premise``: what a set is made from, which is a request and what the unedited model says of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from remend.data.question_rewrites import families_of, template_of
from remend.editors.locate_then_edit.common_questions import CommonQuestions, statement_of, text_of
from remend.editors.locate_then_edit.subject_finder import find_subject
from remend.errors import RequestError
from remend.expansion.kinds import kind_missed, kind_of
from remend.request import Chat, EditRequest, Prompt, in_form_of
from remend.tasks.base import Task
from remend.tasks.endings import asks
from remend.tasks.own_words import as_the_model_says

ANSWER_TOKENS, MOST_WORDS = 8, 5
"""Tokens that are read of how a statement is completed, and the most words of an answer in it."""

_CLAUSE_ENDS = re.compile(
    r"[,.;:!?()\n\"]|\s(?:and|but|or|which|who|that|where|when|in|on|at|is|was|are|were|with|from|for|by|to)\s"
)


@dataclass(frozen=True, eq=False)
class Premise:
    """A request with a subject, and what the unedited model says of it.

    Attributes:
        task: the unedited model.
        questions: how it completes common statements.
        request: the request, with its subject and its target as it was given.
        said: the request with its target as the model would say it.
        statement: the text that the target completes, with ``{}`` for the subject; None where it is not known.
        question: which common question it asks; None where that is not sure.
        near: the common questions that may ask the same, by name.
        old: what the model says now, in a few words; empty where it is not known.
    """

    task: Task
    questions: CommonQuestions
    request: EditRequest
    said: EditRequest
    statement: str | None
    question: str | None
    near: frozenset[str]
    old: str

    @staticmethod
    def of(task: Task, request: EditRequest, questions: CommonQuestions) -> Premise:
        """Find a request's subject and what the model says of it.

        Raises:
            RequestError: the prompt is no text and no conversation, names no subject, or what was given as the subject
                is the target or does not stand in the prompt.
        """
        if not isinstance(request.prompt, str | Chat):
            raise RequestError("a set is made from a text to complete, a question or a conversation")
        subject = (request.subject or "").strip() or find_subject(task, request.prompt)
        if subject.casefold() == request.target.strip().casefold():
            raise RequestError(
                f"the subject {subject!r} is the target: the subject is what the prompt is about, not its answer"
            )
        request = request.model_copy(update={"subject": subject})
        if subject.casefold() not in text_of(request).casefold():
            raise RequestError(
                f"the prompt {text_of(request)[:60]!r} does not hold its subject {subject!r}: give the subject as the "
                "prompt writes it"
            )
        said = as_the_model_says(task, request)
        statement = statement_of(said)
        old = short_answers(task, [statement.replace("{}", subject)])[0] if statement is not None else ""
        template = template_of(text_of(request), subject) if asks(request.prompt) else None
        families = [family.name for family in families_of(template)] if template else []
        if len(families) == 1:
            question: str | None = families[0]
        else:
            question = None if statement is None else questions.question_of(task, statement)
        near = questions.choose(task, said).near | ({question} if question is not None else frozenset())
        return Premise(task, questions, request, said, statement, question, near, old)

    @property
    def subject(self) -> str:
        """What the request is about."""
        return str(self.request.subject)

    @cached_property
    def kind_missed(self) -> str | None:
        """The kind of thing that the model answers now, where the target is none; None where that is not known."""
        return kind_missed(self.task, self.old, self.request.target.strip()) if self.old else None

    @cached_property
    def kind(self) -> str | None:
        """Of what kind the subject is; None where the model is not sure."""
        return kind_of(self.task, self.subject)

    @cached_property
    def target_kind(self) -> str | None:
        """Of what kind the target is; None where the model is not sure."""
        return kind_of(self.task, self.request.target.strip())

    def about(self, name: str) -> str:
        """Return the text of the request's prompt about another name, with a capital where it begins with "the"."""
        text = re.sub(re.escape(self.subject), lambda _: name, text_of(self.request), flags=re.IGNORECASE)
        return text[:1].upper() + text[1:] if text.startswith("the ") else text

    def in_form(self, text: str) -> Prompt:
        """Return a text in the form of the request's prompt: of a conversation, as its last message."""
        return in_form_of(self.request.prompt, text)


def short_answers(task: Task, statements: Sequence[str]) -> list[str]:
    """Return how a model completes each statement, in a few words; nothing where that takes many."""
    return [first_words(task.decode(answer)) for answer in task.predict(statements, ANSWER_TOKENS)]


def first_words(text: str) -> str:
    """Return the first words of an answer, up to where its clause ends; nothing where they are many."""
    words = _CLAUSE_ENDS.split(text.strip())[0].split()
    return " ".join(words) if len(words) <= MOST_WORDS else ""
