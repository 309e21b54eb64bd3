"""What is measured of one edit at one prompt: pure functions, each with its definition and where it comes from.

Shares and probabilities are between 0 and 1; divergences are in nats. What is measured at several prompts of one edit
is averaged over them first, then over edits (:mod:`remend.evaluation.reports.report`), never over tokens.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def normalised(text: str) -> str:
    """A text as answers are compared: case, punctuation, accents' encoding and runs of spaces do not matter.

    As SQuAD compares answers (Rajpurkar et al., 2016, section 6), but for articles: those are words of one language.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in folded).split())


def exact_match(answer: str, wanted: str) -> float:
    """1 if a freely decoded answer, up to where it stopped by itself, is what was wanted, else 0.

    The strict reading of edit success under natural stopping (Yang et al., arXiv 2502.11177). A text of nothing but
    punctuation is compared as it is.
    """
    found, other = normalised(answer), normalised(wanted)
    return float(found == other if other else answer.strip() == wanted.strip())


def contains(answer: str, wanted: str) -> float:
    """1 if what was wanted stands in the answer as whole words, wherever and whatever follows, else 0."""
    found, other = normalised(answer), normalised(wanted)
    return float(f" {other} " in f" {found} " if other else wanted.strip() in answer)


def token_f1(answer: str, wanted: str) -> float:
    """The harmonic mean of precision and recall of the answer's words, as a bag (SQuAD's F1, section 6)."""
    found, other = normalised(answer).split(), normalised(wanted).split()
    if not found or not other:
        return exact_match(answer, wanted)
    shared = sum((Counter(found) & Counter(other)).values())
    return 2 * shared / (len(found) + len(other))


def token_accuracy(chosen: Sequence[int], wanted: Sequence[int]) -> float:
    """The share of a target's tokens that are the model's first choice, each with those before it given.

    A kind measure, for targets so long that hardly any is taken on whole: most of their tokens follow from the others.
    """
    return sum(one == other for one, other in zip(chosen, wanted, strict=True)) / len(wanted) if wanted else 1.0


def first_choices(logits: Float[Tensor, "token vocabulary"]) -> Int[Tensor, " token"]:
    """The most probable token at each place: all that teacher-forced accuracy and greedy decoding look at."""
    return logits.argmax(-1)


def log_probabilities(
    logits: Float[Tensor, "token vocabulary"], target: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """Log p of each target token, in nats and float32."""
    return logits.float().log_softmax(-1).gather(1, target[:, None])[:, 0]


def ranks(logits: Float[Tensor, "token vocabulary"], target: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    """The place of each target token among all tokens by probability, 1 for the most probable; ties are its betters."""
    own = logits.gather(1, target[:, None])
    return (logits >= own).sum(-1)


def divergences(
    before: Float[Tensor, "token vocabulary"], after: Float[Tensor, "token vocabulary"]
) -> Float[Tensor, " token"]:
    """KL(p before ‖ p after) at each place, in nats: the paper's locality term (Eq. 4), at any prompt."""
    p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    found: Tensor = torch.linalg.vecdot(p.exp(), p - q)
    return found


def perplexity(log_p: Float[Tensor, " token"]) -> float:
    """The exponential of the mean −log p over a text's tokens; the paper's measure for generation (section 5).

    A model that is ruined gets e⁸⁰ at most, so that means over edits stay numbers.
    """
    return math.exp(min(-float(log_p.double().mean()), 80.0))


def ngram_entropy(tokens: Sequence[int]) -> float:
    """How varied a text is: the entropy in bits of its bigrams and trigrams, weighted 2/3 and 4/3 and halved.

    ROME's fluency (Meng et al., 2022, section 3.4 and appendix): 0 for one token again and again. Of less than three
    tokens, 0.
    """
    return (2 / 3 * _entropy(_ngrams(tokens, 2)) + 4 / 3 * _entropy(_ngrams(tokens, 3))) / 2


def repetition(tokens: Sequence[int]) -> float:
    """The share of a text's trigrams that stood in it before: 0 where none comes back (Welleck et al., 2019)."""
    found = _ngrams(tokens, 3)
    return 1 - len(set(found)) / len(found) if found else 0.0


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def _entropy(items: Sequence[tuple[int, ...]]) -> float:
    total = len(items)
    return -sum(count / total * math.log2(count / total) for count in Counter(items).values()) if total else 0.0
