"""The models on which editors are compared, each with requests about subjects that no two splits share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.assets import ATLAS, CLAIMS, QUESTIONS
from remend.data import read_source, read_text
from remend.data.passages import generation_requests
from remend.errors import ConfigError
from remend.models import load
from remend.request import EditRequest, read_requests, write_requests
from remend.serialization import write_text

PASSAGES = "passages"
TOKENS = "edit_success_tokens"
"""Edit success as the share of a target's tokens (:func:`remend.evaluation.metrics.functions.token_accuracy`)."""
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.1, "text": 0.1}
"""Parts of the held-out text: of three kinds of request, and of what perplexity is measured on."""
WORDS = 24
"""Of each passage only so much is used, where the paper has a hundred tokens: training takes that much less."""
REQUESTS = ("train", "validation", "test")
"""The splits of requests."""
MOST = {"train": 1_200, "validation": 100, "test": 200}
"""Requests that are made of passages."""


@dataclass(frozen=True)
class World:
    """A model, and what it is for.

    Attributes:
        name: its name in cells.
        source: the model: a built-in one or a folder.
        what: in words.
        paper: the paper's model and task that stand beside it, in words.
        success: the figure that says whether edits take.
        drawdown: the one that says what an edit costs elsewhere.
        new_tokens: the longest answer that is decoded.
        text: of the generation task, a file of passages that the model did not learn from.
        folder: of a world that is not built in, where its requests are.
        at_hand: whether it can be computed on, or only its results are there.
    """

    name: str
    source: str
    what: str
    paper: str
    success: str = "edit_success"
    drawdown: str = "accuracy_drawdown"
    new_tokens: int = 32
    text: Path | None = None
    folder: Path | None = None
    at_hand: bool = True

    def identity(self) -> dict[str, str]:
        """SHA-256 of the model (its name, if it is no folder) and of the text or requests.

        None of a built-in world, nor of one that is not at hand.
        """
        if not self.at_hand:
            return {}
        if self.folder is not None:
            own = {"requests": _hash([self.folder / f"{split}.jsonl" for split in REQUESTS])}
        elif self.text is not None:
            own = {"text": _hash([self.text])}
        else:
            return {}
        source = Path(self.source)
        model = _hash(filter(_is_model, sorted(source.iterdir()))) if source.is_dir() else self.source
        return {"model": model, **own}


def _is_model(file: Path) -> bool:
    """Whether a file of a model's folder determines what the model says."""
    return file.suffix in (".safetensors", ".bin") or file.name in ("config.json", "tokenizer.json")


def _hash(files: Iterable[Path]) -> str:
    """SHA-256 of the files' own, one after the other."""
    found = hashlib.sha256()
    for own in files:
        with own.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


@dataclass(frozen=True)
class Given:
    """What is compared besides the built-in models, and where.

    Attributes:
        writer: a causal language model for the generation task.
        text: passages that it did not learn from.
        world: a folder with a ``model`` and its requests: ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.
        device: of all models, the built-in ones too, as for :func:`remend.load`.
    """

    writer: Path | None = None
    text: Path | None = None
    world: Path | None = None
    device: str = "auto"


def worlds(given: Given = Given()) -> dict[str, World]:  # it is frozen
    """The worlds there are: the three built-in models, and what is given.

    Raises:
        ConfigError: only one of a writer and its text is given, or a folder holds no world.
    """
    writer, text = given.writer, given.text
    if (writer is None) != (text is None):
        raise ConfigError(
            "the generation task needs a model and passages that it did not learn from: give both, or none"
        )
    found = [
        World("facts", ATLAS, "a decoder that knows facts", ""),
        World("questions", QUESTIONS, "an encoder-decoder that answers questions", "zsRE"),
        World("claims", CLAIMS, "a classifier that checks facts", "FEVER"),
    ]
    if writer is not None:
        found.insert(0, _writing(str(writer), text))
    if given.world is not None:
        found.append(_own(given.world, [world.name for world in found]))
    return {world.name: world for world in found}


def remembered(kept: Mapping[str, Mapping[str, str]]) -> dict[str, World]:
    """Worlds that are not at hand, but whose results are.

    Args:
        kept: the :meth:`World.identity` of each, by name.
    """
    return {
        name: replace(_writing("", None) if "text" in own else _given(name, "", Path(name)), at_hand=False)
        for name, own in kept.items()
    }


def _writing(source: str, text: Path | None) -> World:
    """Sampled continuations are hardly ever taken on whole, so their tokens are counted."""
    return World(PASSAGES, source, "a decoder that writes", "Wikitext", TOKENS, "perplexity_drawdown", 12, text)


def _given(name: str, source: str, folder: Path) -> World:
    return World(name, source, "a model of your own", "", folder=folder)


def _own(folder: Path, taken: Sequence[str]) -> World:
    """The world of a folder, by whose name it is called.

    Raises:
        ConfigError: something is missing there, or the name is taken.
    """
    name = folder.resolve().name
    needed = ["model", *(f"{split}.jsonl" for split in REQUESTS)]
    if missing := [part for part in needed if not (folder / part).exists()]:
        raise ConfigError(f"{folder} lacks {missing[0]}; a world is a folder with {', '.join(needed)}")
    if name in taken:
        raise ConfigError(f"there is a world {name!r} already: rename {folder}")
    return _given(name, str(folder / "model"), folder)


class Inhabited:
    """A world with its model loaded and its requests at hand.

    Args:
        world: which.
        folder: where requests that are made of passages are kept.
        device: as for :func:`remend.load`.
    """

    def __init__(self, world: World, folder: Path, device: str) -> None:
        self.world, self.folder = world, folder
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load(world.source, device)

    def requests(self, split: str) -> list[EditRequest]:
        """The requests of one split."""
        if self.world.folder is not None:
            return read_requests(self.world.folder / f"{split}.jsonl")
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
        """What the model learned to say of the training split's subjects, as text; or that split's passages."""
        if self.world.text is not None:
            return list(self.passages("train"))
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
