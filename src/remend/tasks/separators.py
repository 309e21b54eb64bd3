"""``Separators``: what a causal model writes between a prompt and the answer, a space or nothing."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.low_rank_hooks import frozen
from remend.progress import report_progress
from remend.tasks.base import Example
from remend.tasks.same_text import joins_words

if TYPE_CHECKING:
    from remend.tasks.causal_lm import CausalLM

BATCH_SIZE = 64
"""Prompts that go through the model together."""

FEW_SPACES, FEW_SPACES_AFTER_LETTER = 0.1, 0.001
"""Nothing stands between where a smaller share of the words that may come next begins with a space.

Measured on SmolLM2: .999 in an English sentence; .07 in Thai, .05 after "1+1=", less than .01 in Chinese and Japanese,
after quotation marks, "d'" and "https://". A model that knows nothing has the share of its vocabulary, .15 and more.

After a letter of a script that puts spaces between words, a token without one goes on with the same word, which tells
little of another word that follows (.03 in Arabic): the share must be next to nothing there, as for a model of DNA.
"""

SAMPLED = 32
"""Of how many prompts that end alike the model is asked, where one passes for all of them."""

LIKELIEST = 256
"""The next tokens that are looked at; the rest has hardly any probability."""


class Separators:
    """What stands between each prompt and its answer, as the model itself expects it.

    After most prompts the next token begins with a space; not so in scripts without spaces, after an opening quotation
    mark, an apostrophe or "https://". The model decides: of its next-token probability, the mass on words that begin
    with a space is compared with the mass on words that do not. A prompt is decided once.

    Args:
        task: the model.
    """

    def __init__(self, task: CausalLM) -> None:
        self.task = task
        self._chosen: dict[tuple[int, ...], str] = {}
        self._spaced: dict[int, bool | None] = {}
        self._before = task.ids("a", False)  # a word, after which a token shows whether a space begins it

    def __getitem__(self, encoded: tuple[int, ...]) -> str:
        if encoded not in self._chosen:
            self.choose([encoded])
        return self._chosen[encoded]

    @torch.no_grad()
    def choose(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Decide for prompts that are not decided yet, in few passes."""
        # A prompt that fills the context is refused elsewhere; its end is enough here.
        missing = sorted({p for p in prompts if p not in self._chosen}, key=len)
        for start in range(0, len(missing), BATCH_SIZE):
            if len(missing) > BATCH_SIZE:  # else no work of its own: what it is part of tells how far it is
                report_progress("finding what stands before answers", start, len(missing))
            batch = missing[start : start + BATCH_SIZE]
            read = [Example(prompt[-(self.task.context or len(prompt)) :], (0,)) for prompt in batch]
            with frozen(self.task.model):
                logits = self.task.outputs(self.task.collate(read))
            for prompt, spaced in zip(batch, self._spaced_shares(logits), strict=True):
                after_letter = joins_words(self.task.decode_tokens(prompt)[-1:])
                few = FEW_SPACES_AFTER_LETTER if after_letter else FEW_SPACES
                self._chosen[prompt] = "" if spaced < few else " "

    def sample(self, prompts: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], str]:
        """Return what stands after each of many prompts; where a sample that ends alike agrees, the others follow it.

        What the model is asked later is not changed by it.
        """
        alike: dict[str, list[tuple[int, ...]]] = {}
        for prompt in dict.fromkeys(prompts):
            alike.setdefault(_ending(self.task.decode_tokens(prompt)), []).append(prompt)
        samples = {ending: group[:: -(-len(group) // SAMPLED)] for ending, group in alike.items()}
        self.choose([prompt for sample in samples.values() for prompt in sample])
        unsure = {ending for ending, sample in samples.items() if len({self._chosen[prompt] for prompt in sample}) > 1}
        self.choose([prompt for ending in unsure for prompt in alike[ending]])
        return {
            prompt: self._chosen[prompt if ending in unsure else samples[ending][0]]
            for ending, group in alike.items()
            for prompt in group
        }

    def _spaced_shares(self, logits: Float[Tensor, "prompt vocabulary"]) -> list[float]:
        """Return the share of the words that may come next that begins with a space; 1, where no words come next."""
        likeliest = logits.float().softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
        shares = []
        for masses, tokens in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            mass = {True: 0.0, False: 0.0, None: 0.0}
            for probability, token in zip(masses, tokens, strict=True):
                mass[self._begins_with_space(token)] += probability
            words = mass[True] + mass[False]
            shares.append(mass[True] / words if words > 0 else 1.0)
        return shares

    def _begins_with_space(self, token: int) -> bool | None:
        """Tell whether a token begins a word after a space, or without one; None of punctuation and special tokens."""
        if token not in self._spaced:
            before, both = (self.task.decode_tokens(ids, True) for ids in (self._before, [*self._before, token]))
            self._spaced[token] = _spaced(both[len(before) :])
        return self._spaced[token]


def _spaced(text: str) -> bool | None:
    """Tell whether a text begins with a space, or with a word (of which the token may hold only some bytes)."""
    if text.startswith(" "):
        return True
    return False if text[:1] == "\ufffd" or unicodedata.category(text[:1] or " ")[0] in "LNM" else None


def _ending(text: str) -> str:
    """Return what texts that end alike have in common: the script of the last letter, or the last character."""
    last = text[-1:]
    return unicodedata.name(last, last).split()[0] if last.isalnum() else last


def without_outer_spaces(text: str) -> str:
    """Return a text without the spaces around it; those that begin its last line stay, since they indent."""
    begun = text.lstrip(" ")
    bare = begun.rstrip(" ")
    return begun if bare[-1:].isspace() else bare
