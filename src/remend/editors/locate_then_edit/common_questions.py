"""``CommonQuestions``: what is often asked of a subject, and which of it asks the same as a request's prompt.

From one prompt alone an edit cannot tell what it should hold for: the question in other words, and nothing else about
the subject. The model tells: two statements ask the same if it completes them alike about each of several subjects,
and differently about different ones.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.core.low_rank_hooks import frozen
from remend.data.question_rewrites import families, families_of, rewrites, template_of
from remend.progress import report_progress
from remend.request import Chat, EditRequest
from remend.tasks.base import Example, Task, in_batches
from remend.tasks.bfloat16_products import bfloat16_products
from remend.tasks.endings import asks
from remend.tasks.own_words import TARGET_AS_GIVEN

TOP = 32
"""Next tokens of which the probability is kept."""

SAME_FROM, SHARE_OF_BEST = 0.08, 0.4
"""The least similarity of a statement that asks the same, by itself and as a share of the most similar one's."""

SURE_MARGIN = 1.5
"""How many times more similar statements of a question are than those of any other, where it is sure."""

OTHER_BELOW = 0.06
"""The greatest similarity of a statement that asks something else."""

FRAMES_AT_ONCE = 8
"""Statements that are asked together, each about all reference subjects."""

MOST_PHRASINGS, MOST_OTHERS = 4, 32
"""Texts that are chosen, of those that ask the same and statements of those that ask something else."""

MOST_QUESTIONS = 8
"""Questions that are chosen, of those that ask something else: their answers are several tokens long."""


@dataclass(frozen=True)
class Frame:
    """A statement or a question about a subject, with ``{}`` in its place.

    Attributes:
        question: what it asks, in a word or two.
        template: its text.
    """

    question: str
    template: str

    def about(self, subject: str) -> str:
        """Return the text about a subject."""
        return self.template.replace("{}", subject)


@cache
def _bank() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("common_questions.json").read_text(encoding="utf-8")
    bank: dict[str, Any] = json.loads(text)
    return bank


def reference_subjects() -> list[str]:
    """Return well-known subjects of different kinds, about which a model answers differently."""
    subjects: list[str] = _bank()["reference_subjects"]
    return subjects


def other_requests() -> list[str]:
    """Return what a chat model is asked of a subject beside questions, with ``{}`` in its place."""
    requests: list[str] = _bank()["requests"]
    return requests


def bank_hash() -> str:
    """Return a hash of what :meth:`CommonQuestions.measure` asks, which tells whether answers belong to it."""
    asked = [reference_subjects(), {name: forms["statements"] for name, forms in _bank()["questions"].items()}]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@cache
def frames(form: Literal["statements", "questions"]) -> tuple[Frame, ...]:
    """Return all ``statements`` or ``questions``."""
    return tuple(Frame(name, text) for name, forms in _bank()["questions"].items() for text in forms[form])


@dataclass(frozen=True)
class Chosen:
    """What is asked of a request's subject beside its prompt.

    Attributes:
        phrasings: texts that ask the same.
        others: texts that ask something else.
        near: the questions that ask the same, or nearly so.
    """

    phrasings: Sequence[str] = ()
    others: Sequence[str] = ()
    near: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class CommonQuestions:
    """How a model completes the statements about the reference subjects.

    Attributes:
        tokens: the most probable next tokens.
        probabilities: their probabilities.
    """

    tokens: Int[Tensor, "frame subject top"]
    probabilities: Float[Tensor, "frame subject top"]

    @classmethod
    def measure(cls, task: Task) -> CommonQuestions:
        """Ask a causal model all statements about all reference subjects."""
        subjects, statements = reference_subjects(), frames("statements")
        tokens: list[Tensor] = []
        probabilities: list[Tensor] = []
        for start in range(0, len(statements), FRAMES_AT_ONCE):
            report_progress("asking common questions", start, len(statements))
            part = statements[start : start + FRAMES_AT_ONCE]
            answers = next_tokens(task, [frame.about(subject) for frame in part for subject in subjects])
            top = answers.topk(min(TOP, answers.shape[1]), dim=1)
            tokens += top.indices.to(torch.int32).view(len(part), len(subjects), -1)
            probabilities += top.values.view(len(part), len(subjects), -1)
        return cls(torch.stack(tokens), torch.stack(probabilities))

    def similarity(self, task: Task, template: str) -> Float[Tensor, " frame"]:
        """Return how alike a model completes each statement and a template.

        The overlap Σ min(p, p′) of both next-token distributions, the mean over the reference subjects, less the mean
        overlap of one about a subject with the other about another one.
        """
        subjects = reference_subjects()
        given = next_tokens(task, [template.replace("{}", subject) for subject in subjects])
        # Of each statement and subject, at the tokens kept: the probabilities after the template, about each subject.
        of_template = given.T[self.tokens.long()]
        overlap = torch.minimum(self.probabilities[..., None], of_template).sum(2)
        own = torch.eye(len(subjects), dtype=torch.bool)
        return overlap[:, own].mean(1) - overlap[:, ~own].mean(1)

    def question_of(self, task: Task, template: str, similar: Float[Tensor, " frame"] | None = None) -> str | None:
        """Return which common question a statement asks; None where that is not sure.

        Its words tell or, failing that, how the model completes it: alike with those of one question, and with none of
        another.

        Args:
            task: the model.
            template: the statement, with ``{}`` for its subject.
            similar: its :meth:`similarity`, where it is known.
        """
        of_words = [family.name for family in families_of(template)]
        if len(of_words) == 1:
            return of_words[0]
        similar = self.similarity(task, template) if similar is None else similar
        best = _most_similar(similar)
        by_question: dict[str, float] = {}
        for frame, value in zip(frames("statements"), similar.tolist(), strict=True):
            by_question[frame.question] = max(value, by_question.get(frame.question, value))
        others = max((value for question, value in by_question.items() if question != best), default=0.0)
        return best if by_question[best] >= max(SAME_FROM, SURE_MARGIN * others) else None

    def choose(self, task: Task, request: EditRequest, most: int = MOST_PHRASINGS) -> Chosen:
        """Return texts that ask the same as a request with a subject, and texts that ask something else about it.

        Statements for a prompt to complete: those of its common question, where it is sure which that is, and those
        that the model completes alike. Questions for a question: rules tell which ask the same. Where they know no
        other words for it, the sentence around its target tells which common question it is.

        Args:
            task: the model.
            request: the request.
            most: the most phrasings.
        """
        statement, by_rules = statement_of(request), choose_questions(request, most)
        if statement is None or (asks(request.prompt) and by_rules.near):
            return by_rules
        statements, similar = frames("statements"), self.similarity(task, statement)
        best = _most_similar(similar)
        ranked = [i for i in similar.argsort(descending=True).tolist() if statements[i].template != statement]
        least = max(SAME_FROM, SHARE_OF_BEST * float(similar[ranked[0]]))
        likely = [index for index in ranked[: 2 * most] if similar[index] >= least]
        near = frozenset(
            frame.question for frame, value in zip(statements, similar, strict=True) if value > OTHER_BELOW
        )
        subject = str(request.subject)
        if asks(request.prompt):
            asking = [frame for frame in frames("questions") if likely and frame.question == best]
            phrasings = [frame.about(subject) for frame in asking] + list(by_rules.phrasings)
            return Chosen(phrasings[:most], other_questions(request, near | {best}), near)
        others = [index for index in _first_of_each_question() if statements[index].question not in near]
        texts = [statement.replace("{}", subject), *(statements[index].about(subject) for index in likely + others)]
        own, *answers = next_tokens(task, texts)
        answer_of = dict(zip(likely + others, answers, strict=True))
        # What the reference subjects leave open, the model's answer about the subject itself decides.
        same_answer = {index for index, answer in answer_of.items() if answer.argmax() == own.argmax()}
        same = [index for index in likely if statements[index].question == best or index in same_answer]
        phrasings = [text.replace("{}", subject) for text in statements_of(self.question_of(task, statement, similar))]
        phrasings += [statements[index].about(subject) for index in same]
        surest = sorted(set(others) - same_answer, key=lambda index: (-float(answer_of[index].max()), index))
        return Chosen(
            [text for text in dict.fromkeys(phrasings) if text != texts[0]][:most],
            [statements[index].about(subject) for index in surest[:MOST_OTHERS]],
            near,
        )


def statements_of(question: str | None) -> list[str]:
    """Return statements that the answer to a common question completes, with ``{}`` for the subject.

    Of no question there are none. Of the common ones, those whose words are those of another question too are left out.
    """
    common = [frame.template for frame in frames("statements") if frame.question == question]
    own = [text for text in common if all(family.name == question for family in families_of(text))]
    nouns = [noun for family in families() if family.name == question for noun in family.nouns]
    return list(dict.fromkeys([*own, *(f"The {noun} of {{}} is" for noun in nouns)]))


def choose_questions(request: EditRequest, most: int = MOST_PHRASINGS) -> Chosen:
    """Return questions that ask the same as a question about a subject, by rules, and others about it.

    Of a prompt to complete, nothing is known to ask the same.
    """
    if not asks(request.prompt):
        return Chosen(others=other_questions(request))
    subject, question = str(request.subject), text_of(request)
    template = template_of(question, subject)
    near = frozenset(family.name for family in families_of(template)) if template else frozenset()
    phrasings = [rewrite.about(subject) for rewrite in rewrites(question, subject, most)]
    return Chosen(phrasings, other_questions(request, near), near)


def statement_of(request: EditRequest) -> str | None:
    """Return the text that a request's answer completes, with ``{}`` for its subject; None where it is not known.

    It is a prompt to complete, or the sentence around the answer to a question, up to the answer.
    """
    text = str(request.prompt)
    if asks(request.prompt):
        given = (request.model_extra or {}).get(TARGET_AS_GIVEN)
        if not isinstance(given, str) or given not in request.target:
            return None
        text = request.target[: request.target.index(given)].rstrip()
    template = re.sub(re.escape(str(request.subject)), lambda _: "{}", text, count=1, flags=re.IGNORECASE)
    return template if "{}" in template else None


def text_of(request: EditRequest) -> str:
    """Return the text of a request's prompt; of a conversation, its last message."""
    return request.prompt.messages[-1].content if isinstance(request.prompt, Chat) else str(request.prompt)


def frames_that_ask(texts: Sequence[str], subject: str) -> set[str]:
    """Return the common statements and questions about a subject that ask, by their words, what some texts do."""
    slot = re.compile(re.escape(subject), re.IGNORECASE)
    asked = {family.name for text in texts for family in families_of(slot.sub("{}", text))}
    return {f.about(subject) for f in (*frames("statements"), *frames("questions")) if f.question in asked}


def other_questions(request: EditRequest, without: Collection[str] = ()) -> list[str]:
    """Return :data:`MOST_QUESTIONS` questions about a request's subject, as different ones as there are.

    A chat is asked for other things than answers, too.
    """
    first: dict[str, Frame] = {}
    for frame in frames("questions"):
        if frame.question not in without:
            first.setdefault(frame.question, frame)
    step = max(1, len(first) // MOST_QUESTIONS)
    questions = [frame.template for frame in list(first.values())[::step]][:MOST_QUESTIONS]
    requests = other_requests() if isinstance(request.prompt, Chat) else []
    return [template.replace("{}", str(request.subject)) for template in questions + requests]


def asks_the_same(task: Task, template: str, other: str) -> bool:
    """Tell whether a model completes two statements alike about each reference subject, and otherwise about others.

    By the measure of :meth:`CommonQuestions.similarity`, against that of the first statement with itself.
    """
    subjects = reference_subjects()
    one, two = (next_tokens(task, [text.replace("{}", name) for name in subjects]) for text in (template, other))
    own = torch.eye(len(subjects), dtype=torch.bool)

    def similarity(answers: Float[Tensor, "subject token"]) -> float:
        overlap = torch.minimum(one[:, None], answers[None]).sum(2)
        return float(overlap[own].mean() - overlap[~own].mean())

    return similarity(two) >= max(SAME_FROM, SHARE_OF_BEST * similarity(one))


@torch.no_grad()
def next_tokens(task: Task, prompts: Sequence[str]) -> Float[Tensor, "prompt token"]:
    """Return the distribution of a model's next token after each prompt, on the CPU."""
    examples = [Example(tuple(task.encode_input(prompt)), (0,)) for prompt in prompts]
    with frozen(task.model), bfloat16_products(task) as narrow:
        parts = [narrow.outputs(narrow.collate(part)).float().softmax(-1).cpu() for part in in_batches(examples)]
    return torch.cat(parts)


def _most_similar(similar: Float[Tensor, " frame"]) -> str:
    """Return the question whose three most similar statements are the most similar on average."""
    values: dict[str, list[float]] = {}
    for frame, value in zip(frames("statements"), similar.tolist(), strict=True):
        values.setdefault(frame.question, []).append(value)
    return max(values, key=lambda question: sum(sorted(values[question])[-3:]) / min(3, len(values[question])))


def _first_of_each_question() -> list[int]:
    first: dict[str, int] = {}
    for index, frame in enumerate(frames("statements")):
        first.setdefault(frame.question, index)
    return list(first.values())
