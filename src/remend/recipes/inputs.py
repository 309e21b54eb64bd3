"""What a recipe is made of: the model and the requests, of which the user may give others than it names."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.data import read_source, read_text
from remend.data.contamination import shared
from remend.data.passages import generation_requests
from remend.data.registry import DATA_SETS, PASSAGES
from remend.data.source_names import HUB, local, parted
from remend.errors import ConfigError
from remend.models import load
from remend.request import EditRequest, Probe, read_requests, write_requests
from remend.tasks import CausalLM, Classification, Seq2SeqLM, task_of

if TYPE_CHECKING:
    from remend.recipes.recipe import Recipe

SPLITS = ("train", "validation", "test")
FAR = 4
"""Unrelated prompts for a request that names none."""
KINDS: dict[str, type[Any]] = {"causal-lm": CausalLM, "seq2seq": Seq2SeqLM, "classification": Classification}


@dataclass(frozen=True)
class Ingredients:
    """The model and the sources that a run uses.

    Attributes:
        model: a hub id, a folder, or the name of a built-in model.
        writer: likewise, of the model that writes the targets of passages; None for ``model``.
        train: a source.
        validation: a source, or None.
        test: a source.
        text: a file, or None.
    """

    model: str
    writer: str | None
    train: str
    validation: str | None
    test: str
    text: str | None

    @staticmethod
    def of(
        recipe: Recipe,
        model: str | None,
        writer: str | None,
        train: str | None,
        validation: str | None,
        test: str | None,
        text: str | None,
    ) -> Ingredients:
        """The recipe's, but for those that are given.

        Raises:
            ConfigError: something has to be given and was not: all of that is named, with its option.
        """
        sources = {
            "train": train or recipe.train,
            "validation": validation or recipe.validation,
            "test": test or recipe.test,
        }
        missing = []
        if model is None and recipe.model is None:
            missing.append(f"--model, {recipe.needs}")
        if text is not None and recipe.task != "causal-lm":
            raise ConfigError(f"perplexity on a text is a causal language model's: leave text away with {recipe.name}")
        text = text or recipe.text
        named = {split: file_of(source) for split, source in sources.items() if source is not None}
        named["text"] = None if text is None or text.startswith(HUB) else text
        for option, file in named.items():
            if file is not None and not Path(file).is_file():
                missing.append(f"--{option}, since there is no file {file} here{recipe.origin(file)}")
        given = [source for source in sources.values() if source is not None]
        if len(set(given)) < len(given):
            raise ConfigError(
                "two of train, validation and test are the same source: an editor must be judged on what it never saw"
            )
        if missing:
            listed = "\n".join(f"- {own}" for own in missing)
            raise ConfigError(f"the recipe {recipe.name} needs what has to be given:\n{listed}")
        return Ingredients(model or str(recipe.model), writer or recipe.writer, **sources, text=text)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, str | None]:
        """As a JSON object."""
        return asdict(self)

    def passages(self) -> list[str]:
        """The text on which perplexity is measured; none where there is none."""
        return [] if self.text is None else read_text(local(self.text))


def load_model(recipe: Recipe, name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its tokenizer.

    Raises:
        ConfigError: it is of another kind than the recipe is for.
        ModelError: it cannot be loaded.
    """
    model, tokenizer = load(name, device, getattr(torch, recipe.dtype))
    task = task_of(model, tokenizer)
    if not isinstance(task, KINDS[recipe.task]):
        kind = next(known for known, own in KINDS.items() if isinstance(task, own))
        raise ConfigError(
            f"the recipe {recipe.name} is for a {recipe.task} model, but {name} is loaded as a {type(model).__name__}, "
            f"a {kind} model: give another --model (model=)"
            + (f", {recipe.needs}" if recipe.needs else f", such as {recipe.model}, or take another recipe")
        )
    return model, tokenizer


class Pantry:
    """Where the requests of a run come from; those that a model makes are kept in a folder.

    Args:
        recipe: how many are needed, and of what.
        ingredients: what is used for it.
        folder: of what is kept.
        device: of the model that writes, if it is another one.
        seed: of what is drawn.
        limit: at most so many requests of each split.
    """

    def __init__(
        self, recipe: Recipe, ingredients: Ingredients, folder: Path, device: str, seed: int, limit: int | None
    ) -> None:
        self.recipe, self.ingredients, self.folder = recipe, ingredients, folder
        self.device, self.seed, self.limit = device, seed, limit
        self._writer: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def requests(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, resume: bool
    ) -> dict[str, list[EditRequest]]:
        """The requests of each split that has some.

        Raises:
            RequestError: a source cannot be read, or holds nothing.
        """
        if self._written_by_another():
            self._writer = load(str(self.ingredients.writer), self.device)
        found = {}
        for split in SPLITS:
            source = getattr(self.ingredients, split)
            if source is not None:
                found[split] = self._split(split, source, self._writer or (model, tokenizer), resume)
        self._writer = None  # it is needed no more
        return found

    def _written_by_another(self) -> bool:
        sources = [getattr(self.ingredients, split) for split in SPLITS]
        made = any(source is not None and parted(source)[0] == PASSAGES for source in sources)
        return made and self.ingredients.writer is not None and self.ingredients.writer != self.ingredients.model

    def _split(
        self, split: str, source: str, writer: tuple[PreTrainedModel, PreTrainedTokenizerBase], resume: bool
    ) -> list[EditRequest]:
        wanted = {
            "train": self.recipe.train_requests,
            "validation": self.recipe.validation_requests,
            "test": self.recipe.edits,
        }[split]
        counts = [count for count in (wanted, self.limit) if count is not None]
        most = min(counts) if counts else None
        kind, rest = parted(source)
        if kind == PASSAGES:
            file = self.folder / f"{split}.jsonl"
            if not (resume and file.exists()):
                write_requests(file, list(generation_requests(*writer, local(rest), most, self.seed)))
            return read_requests(file)
        every = lent(read_source(source), self.seed)
        if most is None or most >= len(every):
            return every
        places = random.Random(f"{self.recipe.name} {split} {self.seed}").sample(range(len(every)), most)
        return [every[place] for place in sorted(places)]


def lent(requests: Sequence[EditRequest], seed: int) -> list[EditRequest]:
    """The same requests; one without unrelated prompts is lent those of others, with their true answers.

    The paper draws x_loc from the same data (Alg. 1); its files of zsRE and FEVER name no unrelated prompts. Without
    true answers, nothing is lent.
    """
    probes: dict[str, Probe] = {}
    for request in requests:
        truth = (request.model_extra or {}).get("ground_truth")
        if isinstance(truth, str) and truth.strip():
            probes.setdefault(request.key, Probe(prompt=request.prompt, target=truth))
    keys = list(probes)
    found = []
    for number, request in enumerate(requests):
        if not request.locality:
            drawn = random.Random(f"lent {seed} {number}").sample(keys, min(FAR + 1, len(keys)))
            others = tuple(probes[key] for key in drawn if key != request.key)[:FAR]
            request = request.model_copy(update={"locality": others})
        found.append(request)
    return found


def overlap(requests: dict[str, list[EditRequest]]) -> dict[str, int]:
    """How many subjects, prompts and facts of the test were there in training, too; nothing of it should be."""
    both = shared(requests["train"], requests["test"])
    return {kind: len(names) for kind, names in both.items() if names}


def file_of(source: str) -> str | None:
    """The local file that a source names, if it names one: nothing of what ships with remend or lies on the hub."""
    kind, rest = parted(source)
    if (kind is not None and kind not in DATA_SETS) or rest.startswith(HUB):
        return None
    return rest
