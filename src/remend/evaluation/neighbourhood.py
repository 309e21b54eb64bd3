"""``measure_neighbourhood``: what an edit did to each prompt of a request's set, and how near to it each prompt lies.

The pair is in the middle; around it lie what should follow and what should stay. How near a prompt lies is read where
the edit acts: a token at which the edited layer's input holds as much of what the edit listens to as the request's own
prompt does is at distance 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from remend.core.low_rank_hooks import frozen
from remend.edit import Edit
from remend.editors.locate_then_edit.subject_finder import find_subject
from remend.errors import RequestError
from remend.evaluation.before_after import AnswerComparison, compare_answers
from remend.evaluation.neighbours import near_prompts
from remend.evaluation.readability import heard
from remend.request import Chat, EditRequest, Prompt
from remend.tasks.base import Example, Task, in_batches

Place = Literal["the pair", "other ways to ask", "what follows", "the same subject", "the answer elsewhere", "others"]
PLACES: tuple[Place, ...] = get_args(Place)

MOST_OF_KIND = 24
"""Prompts of a kind that are asked where a request names nothing that must stay."""


@dataclass(frozen=True)
class Neighbour:
    """One prompt of a request's set, and what an edit did to it.

    Attributes:
        place: what the prompt is to the request.
        answer: the answers before and after, the wanted one, and whether it is given.
        distance: how far the prompt is from the request's own where the edit acts: 0 as near, 1 where nothing of what
            the edit listens to is in it, and more where it is below what a unit answers.
        effect: KL(unedited ‖ edited) of what follows the prompt first, in nats.
        given: whether the editor was given the prompt, so that its answer says nothing of others.
    """

    place: Place
    answer: AnswerComparison
    distance: float
    effect: float
    given: bool = False

    @property
    def moves(self) -> bool:
        """Whether the answer should become another one."""
        return self.place in ("the pair", "other ways to ask", "what follows")

    @property
    def ok(self) -> bool:
        """Whether the answer is as it should be; one that is written as before has not changed."""
        return bool(self.answer.ok) or (not self.moves and self.answer.before == self.answer.after)

    @property
    def outcome(self) -> str:
        """What the answer did, in a word or two."""
        if self.moves:
            return "followed" if self.ok else "did not follow"
        return "stayed" if self.ok else "changed"


def measure_neighbourhood(task: Task, edit: Edit, request: EditRequest, max_new_tokens: int = 12) -> list[Neighbour]:
    """Measure an edit at every prompt that a request names, what it gives to the editor included.

    Where a request names nothing that must stay, what is near it is asked
    (:func:`remend.evaluation.neighbours.near_prompts`).

    Args:
        task: the unedited model.
        edit: the edit.
        request: the request.
        max_new_tokens: the longest answer.
    """
    asked = list(_asked(task, request))
    prompts = [prompt for _, prompt, _ in asked]
    answers = compare_answers(task, edit, asked, max_new_tokens)
    # What stands there as a target does not count, but an action has as many numbers as the policy has outputs.
    targets = [(0,)] * len(prompts) if task.generates else task.predict(prompts, 1)
    inputs = [Example(task.encode_input(p), target) for p, target in zip(prompts, targets, strict=True)]
    nearness = [heard(task, edit, example) for example in inputs]
    own = max(nearness[0], 1e-6)
    effects = _effects(task, edit, inputs)
    given = {request.prompt, *request.given_paraphrases, *request.given_near}
    given |= {probe.prompt for probe in request.given_portability}
    return [
        Neighbour(place, answer, max(0.0, 1 - near / own), effect, prompt in given)
        for (place, prompt, _), answer, near, effect in zip(asked, answers, nearness, effects, strict=True)
    ]


def _asked(task: Task, request: EditRequest) -> Iterator[tuple[Place, Prompt, str | None]]:
    """Yield each prompt of a request once, with what it is to the request and the answer that is wanted."""
    subject = (request.subject or "").strip()
    if not subject and isinstance(request.prompt, str | Chat) and not task.is_long(request.prompt):
        with suppress(RequestError):  # a prompt that names nothing has no neighbours by its subject
            subject = find_subject(task, request.prompt)
    target = request.target
    listed: list[tuple[Place, Prompt, str | None]] = [("the pair", request.prompt, target)]
    phrasings = (*request.given_paraphrases, *request.paraphrases, *request.unseen_paraphrases)
    listed += [("other ways to ask", prompt, target) for prompt in phrasings]
    follows = (*request.given_portability, *request.portability)
    listed += [("what follows", probe.prompt, probe.target) for probe in follows]
    stays = [*request.given_near, *(probe.prompt for probe in (*request.near, *request.locality))]
    listed += [(_place(prompt, subject, target), prompt, None) for prompt in stays or _unnamed(task, request)]
    seen: set[Prompt] = set()
    for place, prompt, wanted in listed:
        if prompt not in seen:
            seen.add(prompt)
            yield place, prompt, wanted


def _place(prompt: Prompt, subject: str, target: str) -> Place:
    text = (prompt.messages[-1].content if isinstance(prompt, Chat) else str(prompt)).casefold()
    if subject and subject.casefold() in text:
        return "the same subject"
    return "the answer elsewhere" if target.casefold() in text else "others"


def _unnamed(task: Task, request: EditRequest) -> list[Prompt]:
    """Return prompts near a request that names none, the surest of each kind."""
    with suppress(RequestError):
        return [prompt for near in near_prompts(task, request).values() for prompt, _ in near[:MOST_OF_KIND]]
    return []


@torch.no_grad()
def _effects(task: Task, edit: Edit, inputs: Sequence[Example]) -> list[float]:
    """Return the divergence of what follows each text first."""
    found: list[float] = []
    for part in in_batches(inputs):
        batch = task.collate(part)
        with frozen(task.model):
            before = task.outputs(batch)
            with edit.applied(task.model):
                after = task.outputs(batch)
        # Rounding can make a divergence of nothing slightly negative.
        found += task.divergence(before, after, batch).clamp(min=0).tolist()
    return found
