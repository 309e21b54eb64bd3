"""What follows from an edit: other names, facts about its answer, the reverse question, the choice of old and new."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from remend.data.edit_sets import ALIAS, SetItem
from remend.editors.locate_then_edit.common_questions import frames, next_tokens, statements_of, text_of
from remend.expansion.aliases import with_alias
from remend.expansion.derived_relations import derived_relation
from remend.expansion.premise import Premise, short_answers
from remend.expansion.relations import Hop, Relation, relations
from remend.tasks.endings import asks

KNOWN_FROM = 0.5
"""The least probability of its first token, after examples, with which the model knows a fact about the target."""

PROMPTS_OF_HOP, MOST_ALIASES = 2, 2
"""Prompts that ask one fact about the target, of the subject by a phrase, and other names of the subject."""


def relation_of(premise: Premise) -> Relation | None:
    """Return the relation that a request asks for: that of a rule, or else one of its own words, if they make one."""
    return relations().get(premise.question or "") or derived_relation(premise)


def moved_questions(premise: Premise) -> frozenset[str]:
    """Return the common questions about a request's subject that an edit may change: its own, and what follows."""
    asked = [relations()[question] for question in premise.near if question in relations()]
    return premise.near.union(*(relation.direct for relation in asked))


def implications(premise: Premise, most: int) -> list[SetItem]:
    """Return prompts with answers that follow from a request.

    Args:
        premise: what is asked.
        most: the most prompts.
    """
    found = list(_aliases(premise))
    if premise.kind_missed is not None:  # what holds of a city is not asked of a colour
        return found[:most]
    relation = relation_of(premise)
    found += _choices(premise)
    if relation is not None:
        found += [*_hops(premise, relation), *_reverse(premise, relation)]
    return found[:most]


def _aliases(premise: Premise) -> Iterator[SetItem]:
    """Yield the request's prompt about other names of its subject."""
    for text, alias in islice(with_alias(text_of(premise.request), premise.subject), MOST_ALIASES):
        yield SetItem(
            item="implication",
            kind=ALIAS,
            made="another way to write the name",
            sure=0.9,
            prompt=premise.in_form(text),
            target=premise.request.target,
            subject=alias,
        )


def _choices(premise: Premise) -> Iterator[SetItem]:
    """Yield the choice between the old answer and the target, in both orders."""
    old, new = premise.old, premise.request.target
    if not old or old.casefold() == new.casefold():
        return
    text = text_of(premise.request)
    for first, second in ((old, new), (new, old)):
        asked = f"{text} {first} or {second}?" if asks(premise.request.prompt) else f"{first} or {second}? {text}"
        yield SetItem(
            item="implication",
            kind="choice",
            made="old and new answer named",
            prompt=premise.in_form(asked),
            target=new,
        )


def _reverse(premise: Premise, relation: Relation) -> Iterator[SetItem]:
    """Yield the reverse question, where an answer has one subject only."""
    text = relation.inverse_question if asks(premise.request.prompt) else relation.inverse
    if text:
        target = premise.request.target
        yield SetItem(
            item="implication",
            kind="reverse",
            made="the relation turned round",
            sure=0.9,
            prompt=premise.in_form(text.replace("{}", target)),
            target=premise.subject,
            subject=target,
        )


def _hops(premise: Premise, relation: Relation) -> Iterator[SetItem]:
    """Yield what the model knows of the target and not of the old answer, asked of the subject's answer by its role."""
    task, new, old = premise.task, premise.request.target, premise.old
    if not relation.hops:
        return
    about_new = [hop.after_examples(new, task) for hop in relation.hops]
    known = next_tokens(task, about_new).amax(1).tolist()
    answers = short_answers(task, about_new)
    before = (
        short_answers(task, [hop.after_examples(old, task) for hop in relation.hops]) if old else [""] * len(answers)
    )
    for hop, sure, answer, was in zip(relation.hops, known, answers, before, strict=True):
        if sure < KNOWN_FROM or not answer or answer.casefold() in (was.casefold(), new.casefold()):
            continue
        for text in _asked(premise, relation, hop):
            yield SetItem(
                item="implication",
                kind="hop",
                made=f"{hop.question} of the answer, as the model knows it",
                sure=round(sure, 2),
                prompt=premise.in_form(text[:1].upper() + text[1:]),
                target=answer,
                answer=was or None,
            )


def _asked(premise: Premise, relation: Relation, hop: Hop) -> list[str]:
    """Return how a fact about the target is asked of the subject: by phrases, each in another form."""
    names = [noun.replace("{}", premise.subject) for noun in relation.nouns]
    if hop.question in relation.direct:
        names.insert(1, premise.subject)
    if asks(premise.request.prompt):
        forms = [frame.template for frame in frames("questions") if frame.question == hop.question]
    else:
        forms = [hop.statement, *(text for text in statements_of(hop.question) if text != hop.statement)]
    return [forms[i % len(forms)].replace("{}", name) for i, name in enumerate(names[:PROMPTS_OF_HOP])]
