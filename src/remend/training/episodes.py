"""Drawing episodes: an edit pair, a neighbour of it, and an independent locality example (paper, Alg. 1)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from remend.errors import TrainingError
from remend.request import EditRequest
from remend.tasks.causal_lm import CausalLM, Pair


@dataclass(frozen=True)
class EpisodeBatch:
    """A batch of independent episodes.

    Attributes:
        edits: the edit pairs, one an episode.
        neighbours: for each episode a pair that means the same.
        locality: for each episode a pair that is about something else.
        ids: which requests these are, for messages.
    """

    edits: tuple[Pair, ...]
    neighbours: tuple[Pair, ...]
    locality: tuple[Pair, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.edits)

    def __getitem__(self, some: slice) -> EpisodeBatch:
        """Some of the episodes."""
        return EpisodeBatch(self.edits[some], self.neighbours[some], self.locality[some], self.ids[some])

    def probes(self) -> list[Pair]:
        """For each episode its neighbour and its locality example, in this order: 2e and 2e + 1."""
        return [pair for both in zip(self.neighbours, self.locality, strict=True) for pair in both]


@dataclass(frozen=True)
class _Episode:
    edit: Pair
    neighbours: tuple[Pair, ...]
    locality: tuple[Pair, ...]
    subject: str
    id: str


class Episodes:
    """An endless, seeded stream of episodes over a set of requests.

    What step n draws depends on the seed and n alone, so a run can go on from any step. Every request is drawn once an
    epoch; a batch may reach over the end of one, and nothing is dropped.
    """

    def __init__(self, task: CausalLM, requests: Sequence[EditRequest], seed: int) -> None:
        self.task = task
        self.seed = seed
        # Requests share locality examples, and text is tokenised slowly.
        self._tokenise = lru_cache(maxsize=None)(task.tokenise)
        self.episodes = [self._prepare(number, request) for number, request in enumerate(requests)]
        if len({episode.subject for episode in self.episodes}) < 2:
            raise TrainingError(
                f"all {len(requests)} requests are about one subject: locality needs examples about another"
            )
        self._permutation = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return len(self.episodes)

    def batch(self, step: int, size: int) -> EpisodeBatch:
        """The episodes of one training step."""
        return _batch([self._draw(place) for place in range(step * size, (step + 1) * size)])

    def fixed(self, size: int) -> list[EpisodeBatch]:
        """Every request once, with draws that never change: what validation measures."""
        drawn = [self._draw(place, index=place) for place in range(len(self.episodes))]
        return [_batch(drawn[start : start + size]) for start in range(0, len(drawn), size)]

    def longest(self, count: int) -> EpisodeBatch:
        """Made-up episodes of the longest pairs there are: what a pass takes at most."""
        by_length = sorted(self.pairs(), key=len, reverse=True)
        longest = tuple(by_length[i % len(by_length)] for i in range(count))
        return EpisodeBatch(longest, longest, longest, tuple("longest" for _ in longest))

    def edits(self, limit: int, size: int) -> list[list[Pair]]:
        """Up to ``limit`` different edit pairs, in batches: what the normalising statistics are taken over."""
        chosen = list(dict.fromkeys(self.episodes[i].edit for i in self._permutation(-1)))[:limit]
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def pairs(self) -> list[Pair]:
        """Every pair that an episode can draw, once."""
        every = (pair for e in self.episodes for pair in (e.edit, *e.neighbours, *e.locality))
        return list(dict.fromkeys(every))

    def _prepare(self, number: int, request: EditRequest) -> _Episode:
        tokenise = self._tokenise
        edit = tokenise(request.prompt, request.target)
        neighbours = tuple(tokenise(paraphrase, request.target) for paraphrase in request.paraphrases)
        # Without locality examples of its own, a request lends its pair: at these positions the model must not change
        # when another request is edited, whatever it answers there now.
        locality = tuple(tokenise(probe.prompt, probe.target) for probe in request.locality) or (edit,)
        name = str(request.id) if request.id is not None else f"request {number}"
        return _Episode(edit, neighbours or (edit,), locality, request.key, name)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.episodes)))
        random.Random(f"{self.seed} epoch {epoch}").shuffle(order)
        return order

    def _draw(self, place: int, index: int | None = None) -> tuple[_Episode, Pair, Pair]:
        if index is None:
            epoch, within = divmod(place, len(self.episodes))
            index = self._permutation(epoch)[within]
        draw = random.Random(f"{self.seed} episode {place}")
        episode = self.episodes[index]
        neighbour = draw.choice(episode.neighbours)
        about = {pair.prompt for pair in (episode.edit, *episode.neighbours)}
        for _ in range(1_000):  # independent: another subject's example, and not by chance one about this episode
            other = draw.choice(self.episodes)
            locality = draw.choice(other.locality)
            if other.subject != episode.subject and locality.prompt not in about:
                return episode, neighbour, locality
        raise TrainingError(
            f"{episode.id}: found no locality example about another subject among the requests; add some"
        )


def _batch(drawn: Sequence[tuple[_Episode, Pair, Pair]]) -> EpisodeBatch:
    episodes, neighbours, locality = zip(*drawn, strict=True)
    return EpisodeBatch(
        edits=tuple(episode.edit for episode in episodes),
        neighbours=neighbours,
        locality=locality,
        ids=tuple(episode.id for episode in episodes),
    )
