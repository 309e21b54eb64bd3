"""The testbeds: a model and its edit requests each, whose subjects no two splits share.

Three models ship with remend; a model that writes and a folder of the user's own can be added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from remend.assets import ATLAS, CLAIMS, QUESTIONS
from remend.data import read_source, read_text
from remend.data.passages import generation_requests
from remend.data.request_files import read_requests
from remend.errors import ConfigError
from remend.request import EditRequest, write_requests
from remend.saved_folders import write_text
from remend.tasks import load

PASSAGES = "passages"
TOKEN_SUCCESS = "edit_success_tokens"
"""Edit success as the share of a target's tokens (``token_accuracy``)."""
TEXT_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.1, "text": 0.1}
"""How the user's text is divided: three splits of requests, and the text that perplexity is measured on."""
PASSAGE_WORDS = 24
"""Words that are used of each passage. The paper has a hundred tokens; fewer make training faster."""
SPLITS = ("train", "validation", "test")
MAX_PASSAGE_REQUESTS = {"train": 1_200, "validation": 100, "test": 200}


@dataclass(frozen=True)
class Testbed:
    """A model and where its requests come from.

    Attributes:
        name: its name in cells.
        source: the name of a built-in model, or a folder.
        description: of the model.
        paper: the paper's task that its column stands for; empty if there is none.
        success: the metric of edit success.
        drawdown: the metric of drawdown.
        new_tokens: the longest answer that is decoded.
        text: of the generation task, a file of passages that the model did not learn from.
        folder: of a user's testbed, where its requests are.
        available: whether it can be computed on; False if only its results are there.
    """

    __test__ = False  # pytest collects imported classes whose names begin with "Test"

    name: str
    source: str
    description: str
    paper: str
    success: str = "edit_success"
    drawdown: str = "accuracy_drawdown"
    new_tokens: int = 32
    text: Path | None = None
    folder: Path | None = None
    available: bool = True

    def fingerprint(self) -> dict[str, str]:
        """Return SHA-256 of the model (its name, if it is no folder) and of its text or requests.

        Empty for a built-in testbed, and for one that is not available.
        """
        if not self.available:
            return {}
        if self.folder is not None:
            data = {"requests": _hash([self.folder / f"{split}.jsonl" for split in SPLITS])}
        elif self.text is not None:
            data = {"text": _hash([self.text])}
        else:
            return {}
        source = Path(self.source)
        model = _hash(filter(_determines_outputs, sorted(source.iterdir()))) if source.is_dir() else self.source
        return {"model": model, **data}


def _determines_outputs(file: Path) -> bool:
    """Tell whether a file of a model's folder determines the model's outputs."""
    return file.suffix in (".safetensors", ".bin") or file.name in ("config.json", "tokenizer.json")


def _hash(files: Iterable[Path]) -> str:
    """Return SHA-256 of the concatenated SHA-256 digests of files."""
    combined = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            combined.update(hashlib.file_digest(file, "sha256").digest())
    return combined.hexdigest()


@dataclass(frozen=True)
class TestbedOptions:
    """The command line's options about testbeds.

    Attributes:
        writer: a causal language model for the generation task.
        text: passages that it did not learn from.
        testbed: a folder with a ``model`` and its requests: ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.
        device: of all models, the built-in ones too, as for :func:`remend.load`.
    """

    __test__ = False  # as for Testbed

    writer: Path | None = None
    text: Path | None = None
    testbed: Path | None = None
    device: str = "auto"


def make_testbeds(options: TestbedOptions = TestbedOptions()) -> dict[str, Testbed]:  # it is frozen
    """Return the testbeds by name: the three built-in models, and those of the options.

    Raises:
        ConfigError: a writer was given without a text or the other way round, or a folder holds no testbed.
    """
    writer, text = options.writer, options.text
    if (writer is None) != (text is None):
        raise ConfigError(
            "the generation task needs a model and passages that it did not learn from: give both, or none"
        )
    testbeds = [
        Testbed("facts", ATLAS, "a decoder that knows facts", ""),
        Testbed("questions", QUESTIONS, "an encoder-decoder that answers questions", "zsRE"),
        Testbed("claims", CLAIMS, "a classifier that checks facts", "FEVER"),
    ]
    if writer is not None:
        testbeds.insert(0, _generation_testbed(str(writer), text))
    if options.testbed is not None:
        testbeds.append(_testbed_of_folder(options.testbed, [testbed.name for testbed in testbeds]))
    return {testbed.name: testbed for testbed in testbeds}


def stored_testbeds(fingerprints: Mapping[str, Mapping[str, str]]) -> dict[str, Testbed]:
    """Return testbeds of which only results are there, so that tables can show them.

    Args:
        fingerprints: the :meth:`Testbed.fingerprint` of each, by name.
    """
    return {
        name: replace(
            _generation_testbed("", None) if "text" in fingerprint else _user_testbed(name, "", Path(name)),
            available=False,
        )
        for name, fingerprint in fingerprints.items()
    }


def _generation_testbed(source: str, text: Path | None) -> Testbed:
    # Hardly any sampled continuation is reproduced as a whole, so success is the share of its tokens.
    return Testbed(
        PASSAGES, source, "a decoder that writes", "Wikitext", TOKEN_SUCCESS, "perplexity_drawdown", 12, text
    )


def _user_testbed(name: str, source: str, folder: Path) -> Testbed:
    return Testbed(name, source, "a model of your own", "", folder=folder)


def _testbed_of_folder(folder: Path, taken: Sequence[str]) -> Testbed:
    """Return the testbed in a folder, named like it.

    Raises:
        ConfigError: a file is missing, or the name is taken.
    """
    name = folder.resolve().name
    needed = ["model", *(f"{split}.jsonl" for split in SPLITS)]
    if missing := [part for part in needed if not (folder / part).exists()]:
        raise ConfigError(f"{folder} lacks {missing[0]}; a testbed is a folder with {', '.join(needed)}")
    if name in taken:
        raise ConfigError(f"there is a testbed {name!r} already: rename {folder}")
    return _user_testbed(name, str(folder / "model"), folder)


class LoadedTestbed:
    """A testbed with its model loaded, which reads its requests and its text.

    Args:
        testbed: which.
        folder: where requests that are made of passages are stored.
        device: as for :func:`remend.load`.
    """

    def __init__(self, testbed: Testbed, folder: Path, device: str) -> None:
        self.testbed, self.folder = testbed, folder
        self.task = load(testbed.source, device)

    def requests(self, split: str) -> list[EditRequest]:
        """Return the requests of one split; those of passages are generated once and stored."""
        if self.testbed.folder is not None:
            return read_requests(self.testbed.folder / f"{split}.jsonl")
        if self.testbed.text is None:
            return read_source(f"{self.testbed.source}:{split}")
        file = self.folder / f"{self.testbed.name}-{split}.jsonl"
        if not file.exists():
            passages = self.folder / f"{self.testbed.name}-{split}.txt"
            write_text(passages, "\n\n".join(self.passages(split)) + "\n")
            count = MAX_PASSAGE_REQUESTS[split]
            write_requests(file, list(generation_requests(self.task, passages, count)))
        return read_requests(file)

    def sentences(self) -> list[str]:
        """Return what the model learned to say about the training split's subjects, or that split's passages."""
        if self.testbed.text is not None:
            return list(self.passages("train"))
        probes = (probe for request in self.requests("train") for probe in (*request.locality, *request.near))
        return list(dict.fromkeys(f"{probe.prompt} {probe.target}." for probe in probes if probe.target))

    def passages(self, split: str) -> Sequence[str]:
        """Return the part of the user's text that belongs to a split; empty without a text."""
        if self.testbed.text is None:
            return []
        # Headings of Wikitext begin with "=".
        word_lists = (
            passage.split() for passage in read_text(self.testbed.text) if not passage.lstrip().startswith("=")
        )
        passages = [" ".join(words[:PASSAGE_WORDS]) for words in word_lists]
        start = 0.0
        for name, share in TEXT_SHARES.items():
            end = start + share
            if name == split:
                return passages[round(start * len(passages)) : round(end * len(passages))]
            start = end
        raise ConfigError(f"there is no split {split!r}")
