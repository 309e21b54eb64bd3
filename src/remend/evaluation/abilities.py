"""``AbilityPanel``: whether a model can still do what it could before many edits: reckon, read, and know.

None of it is about what is edited. Items that the unedited model gets wrong tell nothing and are left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property

import torch

from remend.core.low_rank_hooks import frozen
from remend.editors.locate_then_edit.common_questions import frames, reference_subjects
from remend.errors import RequestError
from remend.evaluation.conflicting_probes import SubjectIndex
from remend.evaluation.interventions import Intervention
from remend.evaluation.summary import Summary
from remend.request import EditRequest
from remend.tasks.base import Answer, Example, Task

ITEMS = 60
"""Items of each ability that a model is asked."""

NEW_TOKENS = 8
"""Tokens of an answer."""

SURE = 0.5
"""The least probability of the first token of an answer that the model knows."""

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo")
THINGS = ("car", "house", "bicycle", "coat", "door", "boat", "hat", "chair", "bag", "lamp")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")


class AbilityPanel:
    """Sums after examples, answers that stand in the prompt, and common facts, as far as a model gets them right.

    Args:
        task: the unedited model, which writes text.
        requests: what is edited: common facts about their subjects are left out.
    """

    def __init__(self, task: Task, requests: Sequence[EditRequest]) -> None:
        self.task, self._edited = task, SubjectIndex(requests)

    @cached_property
    def items(self) -> Mapping[str, Sequence[tuple[str, Answer]]]:
        """What the unedited model gets right, of each ability: prompts with their answers."""
        asked = {"arithmetic": sums(), "reading": facts_in_context()}
        right = {name: self._right(list(items)) for name, items in asked.items()}
        right["facts"] = self._known()
        return {name: items for name, items in right.items() if items}

    def measure(self, intervention: Intervention) -> dict[str, Summary]:
        """Return, for each ability, the share of what the unedited model gets right that an intervention leaves right.

        Args:
            intervention: what acts on all prompts alike.
        """
        measured = {}
        for name, items in self.items.items():
            with intervention.applied([0]):
                given = intervention.task.predict([prompt for prompt, _ in items], NEW_TOKENS)
            kept = [self.task.gives(prompt, ids, wanted) for (prompt, wanted), ids in zip(items, given, strict=True)]
            measured[name] = Summary.of([float(each) for each in kept])
        return measured

    def _right(self, items: Sequence[tuple[str, str]]) -> list[tuple[str, Answer]]:
        """Return the items that the unedited model gets right; those that its context does not hold are left out."""
        wanted: list[tuple[str, Answer]] = []
        for prompt, target in items:
            with suppress(RequestError):
                wanted.append((prompt, self.task.encode(prompt, target).target))
        given = self.task.predict([prompt for prompt, _ in wanted], NEW_TOKENS)
        return [(p, target) for (p, target), ids in zip(wanted, given, strict=True) if self.task.gives(p, ids, target)]

    def _known(self) -> list[tuple[str, Answer]]:
        """Return common statements about well-known subjects with the answers that the model is sure of."""
        texts = [frame.about(subject) for subject in reference_subjects() for frame in frames("statements")]
        texts = [text for text in texts if not self._edited.mentioned_in(text)]
        drawn = random.Random("facts").sample(texts, min(12 * ITEMS, len(texts)))
        sure: list[str] = []
        for start in range(0, len(drawn), ITEMS):
            part = drawn[start : start + ITEMS]
            batch = self.task.collate([Example(tuple(self.task.encode_input(text)), (0,)) for text in part])
            with torch.no_grad(), frozen(self.task.model):
                likeliest = self.task.outputs(batch).float().softmax(-1).amax(-1)
            first = dict(zip(batch.row.tolist(), likeliest.tolist(), strict=True))
            sure += [text for row, text in enumerate(part) if first[row] >= SURE]
            if len(sure) >= ITEMS:
                break
        sure = sure[:ITEMS]
        given = self.task.predict(sure, NEW_TOKENS) if sure else []
        spans = [(text, self.task.answer_span(text, ids)) for text, ids in zip(sure, given, strict=True)]
        return [(text, answer) for text, answer in spans if self.task.decode(answer).strip()]


def sums() -> Iterator[tuple[str, str]]:
    """Yield sums of numbers up to 20, each after three that are worked out."""
    rng = random.Random("sums")
    for _ in range(ITEMS):
        *shown, (one, other) = [(rng.randint(1, 20), rng.randint(1, 20)) for _ in range(4)]
        examples = "".join(f"{a} + {b} = {a + b}\n" for a, b in shown)
        yield f"{examples}{one} + {other} =", str(one + other)


def facts_in_context() -> Iterator[tuple[str, str]]:
    """Yield facts about two people and a question on one of them, after two that are answered."""
    rng = random.Random("facts in context")

    def question() -> tuple[str, str]:
        (first, second), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
        one, other = rng.sample(COLOURS, 2)
        name, colour = rng.choice([(first, one), (second, other)])
        told = f"{first} has a {one} {thing}. {second} has a {other} {thing}."
        return f"{told}\nWhat colour is the {thing} of {name}? It is", colour

    for _ in range(ITEMS):
        *shown, (asked, colour) = [question() for _ in range(3)]
        examples = "".join(f"{text} {answer}.\n\n" for text, answer in shown)
        yield examples + asked, colour
