"""The models on which editors are compared, each with requests about subjects that no two splits share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.assets import ATLAS, CLAIMS, QUESTIONS
from remend.data import read_source, read_text
from remend.data.passages import generation_requests
from remend.errors import ConfigError
from remend.models import load
from remend.request import EditRequest, read_requests, write_requests
from remend.storage import write_text

PASSAGES = "passages"
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.1, "text": 0.1}
"""Parts of the held-out text: of three kinds of request, and of what perplexity is measured on."""
WORDS = 40
"""Of each passage only so much is used: training goes three times as fast as with the paper's hundred tokens."""
MOST = {"train": 1_200, "validation": 100, "test": 200}
"""Requests that are made of passages."""


@dataclass(frozen=True)
class World:
    """A model, what it is for, and how it is edited elsewhere than in its MLPs.

    Attributes:
        name: its name in cells.
        source: the model: a built-in one or a folder.
        what: in words.
        paper: the paper's model and task that stand beside it, in words.
        attention: globs of the attention's matrices (Table 9).
        drawdown: the metric that says what an edit costs elsewhere.
        text: of the generation task, a file of passages that the model did not learn from.
    """

    name: str
    source: str
    what: str
    paper: str
    attention: tuple[str, ...]
    drawdown: str = "accuracy_drawdown"
    text: Path | None = None


def worlds(writer: Path | None = None, text: Path | None = None) -> dict[str, World]:
    """The worlds there are: the three built-in models and, if its folder is given, a model that writes.

    Raises:
        ConfigError: only one of model and text is given.
    """
    if (writer is None) != (text is None):
        raise ConfigError(
            "the generation task needs a model and passages that it did not learn from: give both, or none"
        )
    found = [
        World("facts", ATLAS, "a decoder that knows facts", "", ("*attn.c_attn", "*attn.c_proj")),
        World(
            "questions", QUESTIONS, "an encoder-decoder that answers questions", "zsRE", ("*SelfAttention.*",)
        ),
        World("claims", CLAIMS, "a classifier that checks facts", "FEVER", ("*attention.*",)),
    ]  # fmt: skip
    if writer is not None:
        attention = ("*attn.c_attn", "*attn.c_proj")
        found.insert(
            0,
            World(
                PASSAGES, str(writer), "a decoder that writes", "Wikitext", attention, "perplexity_drawdown", text
            ),
        )  # fmt: skip
    return {world.name: world for world in found}


class Inhabited:
    """A world with its model loaded and its requests at hand.

    Args:
        world: which.
        folder: where requests that are made of passages are kept.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load(world.source, "cpu")

    def requests(self, split: str) -> list[EditRequest]:
        """The requests of one split."""
        if self.world.text is None:
            return read_source(f"{self.world.source}:{split}")
        file = self.folder / f"{self.world.name}-{split}.jsonl"
        if not file.exists():
            passages = self.folder / f"{self.world.name}-{split}.txt"
            write_text(passages, "\n\n".join(self.passages(split)) + "\n")
            made = list(generation_requests(self.model, self.tokenizer, passages, MOST[split]))
            write_requests(file, made)
        return read_requests(file)

    def sentences(self) -> list[str]:
        """What the model learned to say of the training split's subjects, as text for editors that measure what it reads."""
        probes = (probe for request in self.requests("train") for probe in (*request.locality, *request.near))
        return list(dict.fromkeys(f"{probe.prompt} {probe.target}." for probe in probes if probe.target))

    def passages(self, split: str) -> Sequence[str]:
        """The part of the held-out text that belongs to a split; none where there is no text."""
        if self.world.text is None:
            return []
        long = (passage.split() for passage in read_text(self.world.text) if not passage.lstrip().startswith("="))
        every = [" ".join(words[:WORDS]) for words in long]
        start = 0.0
        for name, share in SPLITS.items():
            end = start + share
            if name == split:
                return every[round(start * len(every)) : round(end * len(every))]
            start = end
        raise ConfigError(f"there is no split {split!r}")
