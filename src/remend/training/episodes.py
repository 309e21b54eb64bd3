"""Drawing episodes: an edit pair, a neighbour of it, and an independent locality example (paper, Alg. 1)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from jaxtyping import Bool, Float
from torch import Tensor

from remend.errors import TrainingError, prefix_request_errors
from remend.request import EditRequest
from remend.tasks.base import Example, Task

FEW = 2
"""Paraphrases below which a request's own prompt is one of its neighbours, too."""


@dataclass(frozen=True)
class EpisodeBatch:
    """A batch of independent episodes.

    Attributes:
        edits: the edit pairs, one an episode.
        neighbours: for each episode a pair that means the same.
        locality: for each episode a pair that is about something else.
        ids: which requests these are, for messages.
    """

    edits: tuple[Example, ...]
    neighbours: tuple[Example, ...]
    locality: tuple[Example, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.edits)

    def __getitem__(self, some: slice) -> EpisodeBatch:
        """Some of the episodes."""
        return EpisodeBatch(self.edits[some], self.neighbours[some], self.locality[some], self.ids[some])

    def probes(self) -> list[Example]:
        """For each episode its neighbour and its locality example, in this order: 2e and 2e + 1."""
        return [pair for both in zip(self.neighbours, self.locality, strict=True) for pair in both]


@dataclass(frozen=True, eq=False)
class EpisodeLosses:
    """What a batch of episodes gave, one number an episode.

    Attributes:
        edit: −log p_edited(y'|x') of the neighbour, nats a token.
        locality: KL(p_base ‖ p_edited) on the locality example, nats a token.
        taken: whether greedy decoding of the neighbour gives the whole target and the end token.
        kept: whether the edited model's first choice at every locality token is the base model's.
    """

    edit: Float[Tensor, " episode"]
    locality: Float[Tensor, " episode"]
    taken: Bool[Tensor, " episode"]
    kept: Bool[Tensor, " episode"]

    def finite(self) -> Bool[Tensor, " episode"]:
        """Which episodes' losses are numbers."""
        return (self.edit + self.locality).isfinite()


@dataclass(frozen=True)
class FactPrompts:
    """What several requests with the same prompts ask for: the prompts, and those near to them that ask for others."""

    prompts: tuple[Example, ...]
    near: tuple[Example, ...]


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
    def prompts(self) -> frozenset[tuple[int, ...]]:
        """What it is about: its prompts, whatever their answer."""
        return frozenset(pair.input for pair in (self.edit, *self.neighbours))


class Episodes:
    """An endless, seeded stream of episodes over a set of requests.

    What step n draws depends on the seed and n alone, so a run can go on from any step. Every request is drawn once an
    epoch; a batch may reach over the end of one, and nothing is dropped.

    Args:
        task: the base model.
        requests: what episodes are about.
        seed: of every draw.
        near: the share of locality examples that are near negatives, for episodes that have some.
        in_batch: the share that are edits of other episodes of the batch.
    """

    def __init__(
        self, task: Task, requests: Sequence[EditRequest], seed: int, near: float = 0.0, in_batch: float = 0.0
    ) -> None:
        self.task = task
        self.seed = seed
        self.near, self.in_batch = near, in_batch
        # Requests share locality examples, and text is tokenised slowly.
        self._tokenise = lru_cache(maxsize=None)(task.encode)
        self.episodes = [self._prepare(number, request) for number, request in enumerate(requests)]
        if len({episode.subject for episode in self.episodes}) < 2:
            raise TrainingError(
                f"no two of the requests ({len(requests)}) are about different subjects: locality needs examples about "
                "another"
            )
        self._permutation = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return len(self.episodes)

    def batch(self, step: int, size: int, turn: int = 0) -> EpisodeBatch:
        """The episodes of one training step; another ``turn`` draws other locality examples for the same edits."""
        return self._batch(range(step * size, (step + 1) * size), turn)

    def fixed(self, size: int) -> list[EpisodeBatch]:
        """Every request once, with draws that never change: what validation measures."""
        places = range(len(self.episodes))
        return [self._batch(places[start : start + size], fixed=True) for start in range(0, len(places), size)]

    def longest(self, count: int) -> EpisodeBatch:
        """Made-up episodes of the longest pairs there are: what a pass takes at most."""
        by_length = sorted(self.pairs(), key=len, reverse=True)
        longest = tuple(by_length[i % len(by_length)] for i in range(count))
        return EpisodeBatch(longest, longest, longest, tuple("longest" for _ in longest))

    def edits(self, limit: int, size: int) -> list[list[Example]]:
        """Up to ``limit`` different edit pairs, in batches: what the normalising statistics are taken over."""
        chosen = list(dict.fromkeys(self.episodes[i].edit for i in self._permutation(-1)))[:limit]
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def pairs(self) -> list[Example]:
        """Every pair that an episode can draw, once."""
        near = (pair for e in self.episodes for pair in e.near) if self.near else ()
        every = (pair for e in self.episodes for pair in (e.edit, *e.neighbours, *e.locality))
        return list(dict.fromkeys((*every, *near)))

    def facts(self) -> list[FactPrompts]:
        """What the requests are about, in an order of no meaning: those with the same prompts are about one fact."""
        found: dict[frozenset[tuple[int, ...]], list[_Episode]] = {}
        for place in self._permutation(-1):
            found.setdefault(self.episodes[place].prompts, []).append(self.episodes[place])
        return [
            FactPrompts(
                tuple({pair.input: pair for pair in (own[0].edit, *own[0].neighbours)}.values()),
                tuple({pair.input: pair for episode in own for pair in episode.near}.values()),
            )
            for own in found.values()
        ]

    def _prepare(self, number: int, request: EditRequest) -> _Episode:
        name = str(request.id) if request.id is not None else f"request {number}"
        with prefix_request_errors(name):
            return self._tokenised(name, request)

    def _tokenised(self, name: str, request: EditRequest) -> _Episode:
        encode = self._tokenise
        edit = encode(request.prompt, request.target)
        neighbours = tuple(encode(paraphrase, request.target) for paraphrase in request.paraphrases)
        # Without locality examples of its own, a request lends its pair: at these positions the model must not change
        # when another request is edited, whatever it answers there now.
        locality = tuple(encode(probe.prompt, probe.target) for probe in request.locality) or (edit,)
        near = tuple(encode(probe.prompt, probe.target) for probe in request.near)
        relation = (request.model_extra or {}).get("relation")
        if len(neighbours) < FEW:  # or an edit learns to take on a paraphrase, and not on its own prompt
            neighbours = (edit, *neighbours)
        return _Episode(edit, neighbours, locality, near, request.key, relation, name)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.episodes)))
        random.Random(f"{self.seed} epoch {epoch}").shuffle(order)
        return order

    def _batch(self, places: Sequence[int], turn: int = 0, fixed: bool = False) -> EpisodeBatch:
        episodes = [self.episodes[place if fixed else self._index(place)] for place in places]
        mark = f" {turn}" if turn else ""
        draws = [random.Random(f"{self.seed} episode {place}") for place in places]
        neighbours = [draw.choice(episode.neighbours) for draw, episode in zip(draws, episodes, strict=True)]
        if turn:
            draws = [random.Random(f"{self.seed} episode {place}{mark}") for place in places]
        far = [self._far(episode, draw) for episode, draw in zip(episodes, draws, strict=True)]
        return EpisodeBatch(
            edits=tuple(episode.edit for episode in episodes),
            neighbours=tuple(neighbours),
            locality=tuple(
                self._closer(episode, episodes, random.Random(f"{self.seed} near {place}{mark}")) or other
                for episode, other, place in zip(episodes, far, places, strict=True)
            ),
            ids=tuple(episode.id for episode in episodes),
        )

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, len(self.episodes))
        return self._permutation(epoch)[within]

    def _far(self, episode: _Episode, draw: random.Random) -> Example:
        """An independent example: another subject's, and not by chance one about this episode."""
        about = episode.prompts
        for _ in range(1_000):
            other = draw.choice(self.episodes)
            locality = draw.choice(other.locality)
            if other.subject != episode.subject and locality.input not in about:
                return locality
        raise TrainingError(
            f"{episode.id}: found no locality example about another subject among the requests; add some"
        )

    def _closer(self, episode: _Episode, batch: Sequence[_Episode], draw: random.Random) -> Example | None:
        """A locality example that an edit leaks to more easily, as often as was asked for."""
        chance = draw.random()
        if chance < self.near:
            return draw.choice(episode.near) if episode.near else None
        if chance < self.near + self.in_batch:
            others = [o for o in batch if o.subject != episode.subject and o.edit.input not in episode.prompts]
            alike = [other for other in others if other.relation is not None and other.relation == episode.relation]
            return draw.choice(alike or others).edit if others else None
        return None
