"""``Episodes``: draws an edit pair, a neighbour of it and an independent locality example (paper, Alg. 1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from jaxtyping import Bool, Float
from torch import Tensor

from remend.editors.trainable import FactPrompts, TrainableEditor
from remend.errors import TrainingError, prefix_request_errors
from remend.progress import report_progress
from remend.request import Completion, EditRequest, Probe, Prompt, as_completion
from remend.tasks.base import EncodedInput, Example, Task

FEW_PARAPHRASES = 2
"""With fewer paraphrases than this, the edit pair itself is one of its neighbours."""

MOST_DRAWS = 1_000
"""The number of locality examples drawn for an episode before it counts as having none."""


@dataclass(frozen=True)
class EpisodeBatch:
    """A batch of independent episodes.

    Attributes:
        edits: the edit pair of each episode.
        neighbours: for each episode an example that means the same.
        locality: for each episode an example that is about something else.
        ids: the ids of the requests, for messages.
    """

    edits: tuple[Example, ...]
    neighbours: tuple[Example, ...]
    locality: tuple[Example, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.edits)

    def __getitem__(self, index: slice) -> EpisodeBatch:
        """Return a part of the episodes."""
        return EpisodeBatch(self.edits[index], self.neighbours[index], self.locality[index], self.ids[index])

    def probes(self) -> list[Example]:
        """Return the neighbour of each episode e and its locality example, at the indices 2e and 2e + 1."""
        return [example for probes in zip(self.neighbours, self.locality, strict=True) for example in probes]


@dataclass(frozen=True, eq=False)
class EpisodeLosses:
    """The losses of a batch of episodes, one number for each episode.

    Attributes:
        edit: −log p_edited(y'|x') of the neighbour, in nats per target token.
        locality: KL(p_base ‖ p_edited) on the locality example, in nats per target token.
        correct: whether the edited model predicts every target of the neighbour, the end token included.
        unchanged: whether the edited model predicts the same as the base model at every target of the locality example.
    """

    edit: Float[Tensor, " episode"]
    locality: Float[Tensor, " episode"]
    correct: Bool[Tensor, " episode"]
    unchanged: Bool[Tensor, " episode"]

    def finite(self) -> Bool[Tensor, " episode"]:
        """Tell for each episode whether its losses are finite."""
        return (self.edit + self.locality).isfinite()


@dataclass(frozen=True)
class _Episode:
    edit: Example
    neighbours: tuple[Example, ...]
    locality: tuple[Example, ...]
    near: tuple[Example, ...]
    subject: str
    relation: object
    id: str

    @property
    def prompts(self) -> frozenset[EncodedInput]:
        """The prompts of the episode, which identify what is asked, whatever the target."""
        return frozenset(example.input for example in (self.edit, *self.neighbours))


TRAINED_PROMPTS = ("paraphrases", "given_paraphrases", "given_near")
TRAINED_PROBES = ("locality", "near", "given_portability")
"""The fields of a request that are trained on beside its prompt and target."""


class Episodes:
    """An endless, seeded stream of episodes over a set of requests.

    What step n draws depends on the seed and n alone, so a run can resume at any step. Every request is drawn once per
    epoch. A batch may extend over the end of an epoch, and no request is dropped.

    Args:
        task: the base model.
        requests: the requests, each of which becomes an episode.
        seed: the seed of every draw.
        near: the share of locality examples that are near negatives, for episodes that have some.
        in_batch: the share that are edit pairs of other episodes of the batch.
        editor: says what an edit pair is (:meth:`TrainableEditor.encode_edit`, :meth:`TrainableEditor.end_targets`); by
            default prompt and target.
    """

    def __init__(
        self,
        task: Task,
        requests: Sequence[EditRequest],
        seed: int,
        near: float = 0.0,
        in_batch: float = 0.0,
        editor: TrainableEditor | None = None,
    ) -> None:
        self.task = task
        self.seed = seed
        self.near, self.in_batch = near, in_batch
        # Requests share locality examples, and tokenizing text is slow.
        self._encode = lru_cache(maxsize=None)(task.encode)
        self.editor = editor
        prompts = [prompt for request in requests for prompt in _prompts(request)]
        between = task.sample_separators(prompts)
        requests = with_separators(requests, between.get)
        task.choose_answer_forms(prompt for request in requests for prompt in _prompts(request))
        self.episodes = self._end_targets(requests, [self._prepare(*of, len(requests)) for of in enumerate(requests)])
        if len({episode.subject for episode in self.episodes}) < 2:
            raise TrainingError(
                f"no two of the requests ({len(requests)}) are about different subjects: locality needs examples about "
                "another"
            )
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return len(self.episodes)

    def batch(self, step: int, size: int, turn: int = 0) -> EpisodeBatch:
        """Return the episodes of a step; another ``turn`` draws other locality examples for the same edits."""
        return self._batch(range(step * size, (step + 1) * size), turn)

    def fixed(self, size: int) -> list[EpisodeBatch]:
        """Return an episode of every request in batches, with draws that never change: for validation."""
        indices = range(len(self.episodes))
        return [self._batch(indices[start : start + size], fixed=True) for start in range(0, len(indices), size)]

    def longest(self, count: int) -> EpisodeBatch:
        """Return made-up episodes of the longest examples, for estimates of the memory that a pass takes at most."""
        by_length = sorted(self.pairs(), key=len, reverse=True)
        longest = tuple(by_length[i % len(by_length)] for i in range(count))
        return EpisodeBatch(longest, longest, longest, tuple("longest" for _ in longest))

    def edits(self, limit: int, size: int) -> list[list[Example]]:
        """Return up to ``limit`` different edit pairs in random order, in batches: for statistics."""
        edits = list(dict.fromkeys(self.episodes[i].edit for i in self._permutation(-1)))[:limit]
        return [edits[start : start + size] for start in range(0, len(edits), size)]

    def pairs(self) -> list[Example]:
        """Return every example that an episode can draw, once."""
        near = (example for e in self.episodes for example in e.near) if self.near else ()
        drawn = (example for e in self.episodes for example in (e.edit, *e.neighbours, *e.locality))
        return list(dict.fromkeys((*drawn, *near)))

    def facts(self) -> list[FactPrompts]:
        """Return the facts of the requests, in random order; requests with the same prompts are about one fact."""
        facts: dict[frozenset[EncodedInput], list[_Episode]] = {}
        for index in self._permutation(-1):
            facts.setdefault(self.episodes[index].prompts, []).append(self.episodes[index])
        return [
            FactPrompts(
                tuple({example.input: example for example in (group[0].edit, *group[0].neighbours)}.values()),
                tuple({example.input: example for episode in group for example in episode.near}.values()),
            )
            for group in facts.values()
        ]

    def _prepare(self, number: int, request: EditRequest, count: int) -> _Episode:
        report_progress("encoding the requests", number, count)
        name = str(request.id) if request.id is not None else f"request {number}"
        with prefix_request_errors(name):
            return self._encode_request(name, request)

    def _encode_request(self, name: str, request: EditRequest) -> _Episode:
        encode = self._encode
        edit = self.editor.encode_edit(self.task, request) if self.editor else encode(request.prompt, request.target)
        # A set (remend.expansion) says what else moves, and what stays; the edit is made from the pair alone.
        asked = dict.fromkeys(
            [(prompt, request.target) for prompt in (*request.paraphrases, *request.given_paraphrases)]
        )
        asked |= dict.fromkeys((probe.prompt, probe.target) for probe in request.given_portability)
        neighbours = tuple(encode(prompt, target) for prompt, target in asked)
        # A request without locality examples lends its edit pair: when another request is edited, the model must not
        # change there, whatever it predicts.
        locality = tuple(encode(probe.prompt, probe.target) for probe in request.locality) or (edit,)
        near = tuple(encode(probe.prompt, probe.target) for probe in request.near)
        # Of those that a set names the answer is not known, but what the model says first: it is what should stay.
        near += tuple(Example(self.task.encode_input(prompt), (0,)) for prompt in request.given_near)
        relation = (request.model_extra or {}).get("relation")
        if len(neighbours) < FEW_PARAPHRASES:  # otherwise edits learn to act on the paraphrase, not on their own prompt
            neighbours = (edit, *neighbours)
        return _Episode(edit, neighbours, locality, near, request.key, relation, name)

    def _end_targets(self, requests: Sequence[EditRequest], episodes: Sequence[_Episode]) -> list[_Episode]:
        """Return the episodes with targets as long as the editor teaches them."""
        if self.editor is None:
            return list(episodes)
        edits = [episode.edit for episode in episodes]
        longer = self.editor.end_targets(self.task, [request.prompt for request in requests], edits)
        return [
            replace(
                episode,
                edit=edit,
                neighbours=tuple(
                    replace(other, target=edit.target) if other.target == episode.edit.target else other
                    for other in episode.neighbours
                ),
            )
            for episode, edit in zip(episodes, longer, strict=True)
        ]

    def _shuffle(self, epoch: int) -> list[int]:
        order = list(range(len(self.episodes)))
        random.Random(f"{self.seed} epoch {epoch}").shuffle(order)
        return order

    def _batch(self, numbers: Sequence[int], turn: int = 0, fixed: bool = False) -> EpisodeBatch:
        """Draw the episodes with some numbers of the endless stream.

        Args:
            numbers: numbers of episodes, counted from the start of training.
            turn: selects other locality examples for the same edits.
            fixed: whether numbers are indices of requests, in place of positions in shuffled epochs.
        """
        episodes = [self.episodes[number if fixed else self._index(number)] for number in numbers]
        suffix = f" {turn}" if turn else ""
        draws = [random.Random(f"{self.seed} episode {number}") for number in numbers]
        neighbours = [draw.choice(episode.neighbours) for draw, episode in zip(draws, episodes, strict=True)]
        # The neighbour is the first draw of an episode's generator and the locality example the next. Other turns keep
        # the neighbour, so they draw from generators of their own.
        if turn:
            draws = [random.Random(f"{self.seed} episode {number}{suffix}") for number in numbers]
        unrelated = [self._draw_unrelated(episode, draw) for episode, draw in zip(episodes, draws, strict=True)]
        return EpisodeBatch(
            edits=tuple(episode.edit for episode in episodes),
            neighbours=tuple(neighbours),
            locality=tuple(
                self._draw_negative(episode, episodes, random.Random(f"{self.seed} near {number}{suffix}")) or other
                for episode, other, number in zip(episodes, unrelated, numbers, strict=True)
            ),
            ids=tuple(episode.id for episode in episodes),
        )

    def _index(self, number: int) -> int:
        epoch, position = divmod(number, len(self.episodes))
        return self._permutation(epoch)[position]

    def _draw_unrelated(self, episode: _Episode, draw: random.Random) -> Example:
        """Draw a locality example of another subject's request that is not one of the episode's prompts by chance."""
        prompts = episode.prompts
        for _ in range(MOST_DRAWS):
            other = draw.choice(self.episodes)
            locality = draw.choice(other.locality)
            if other.subject != episode.subject and locality.input not in prompts:
                return locality
        raise TrainingError(
            f"{episode.id}: found no locality example about another subject among the requests; add some"
        )

    def _draw_negative(self, episode: _Episode, batch: Sequence[_Episode], draw: random.Random) -> Example | None:
        """Draw a locality example that the edit leaks to more easily, with the probability that the settings give."""
        chance = draw.random()
        if chance < self.near:
            return draw.choice(episode.near) if episode.near else None
        if chance < self.near + self.in_batch:
            others = [o for o in batch if o.subject != episode.subject and o.edit.input not in episode.prompts]
            alike = [other for other in others if other.relation is not None and other.relation == episode.relation]
            return draw.choice(alike or others).edit if others else None
        return None


def _prompts(request: EditRequest) -> tuple[Prompt, ...]:
    """Return the prompts of a request that are trained on."""
    asked = [prompt for name in TRAINED_PROMPTS for prompt in getattr(request, name)]
    return (request.prompt, *asked, *(probe.prompt for name in TRAINED_PROBES for probe in getattr(request, name)))


def with_separators(requests: Sequence[EditRequest], between: Callable[[str], str | None]) -> list[EditRequest]:
    """Return requests with what stands between the texts that are trained on and their answers, where they do not say.

    Args:
        requests: the requests.
        between: returns what stands after a text, or None where the model is to decide.
    """

    def completed(prompt: Prompt) -> Prompt:
        if isinstance(prompt, Completion) or not isinstance(prompt, str):
            return prompt
        return as_completion(prompt, between(prompt))

    def probes(given: tuple[Probe, ...]) -> tuple[Probe, ...]:
        return tuple(probe.model_copy(update={"prompt": completed(probe.prompt)}) for probe in given)

    return [
        request.model_copy(
            update={
                "prompt": completed(request.prompt),
                **{name: tuple(map(completed, getattr(request, name))) for name in TRAINED_PROMPTS},
                **{name: probes(getattr(request, name)) for name in TRAINED_PROBES},
            }
        )
        for request in requests
    ]
