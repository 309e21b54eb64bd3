"""The inputs of a recipe's run: the model, the requests and the text, each the recipe's or given by the user."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from remend.data import read_source, read_text
from remend.data.contamination import find_overlap
from remend.data.passages import generation_requests
from remend.data.request_files import read_requests
from remend.data.source_names import HUB_PREFIX, local_path, parse_source_name
from remend.errors import ConfigError
from remend.registries import DATASETS
from remend.request import EditRequest, Probe, write_requests
from remend.tasks import Task, load

if TYPE_CHECKING:
    from remend.recipes.recipe import Recipe

SPLITS = ("train", "validation", "test")
UNRELATED_PROMPTS = 4
"""How many unrelated prompts a request gets that names none."""


@dataclass(frozen=True)
class RunInputs:
    """The model and the sources that a run uses.

    Attributes:
        model: a hub id, a folder, or the name of a built-in model.
        writer: the model that writes the targets of passages, named likewise; None for ``model``.
        train: a source of requests.
        validation: a source of requests, or None.
        test: a source of requests.
        text: a file of passages, or None.
    """

    model: str
    writer: str | None
    train: str
    validation: str | None
    test: str
    text: str | None

    @staticmethod
    def resolve(
        recipe: Recipe,
        *,
        model: str | None = None,
        writer: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        text: str | None = None,
    ) -> RunInputs:
        """Take each input from the arguments, or from the recipe where the argument is None.

        Raises:
            ConfigError: inputs are missing (the message lists them all, each with its option), two splits are the same
                source, or a text was given to a model that has no perplexity.
        """
        if text is not None and recipe.task != "causal-lm":
            raise ConfigError(
                f"perplexity is measured only for causal language models: leave text away with {recipe.name}"
            )
        train, validation, test = train or recipe.train, validation or recipe.validation, test or recipe.test
        splits = {"train": train, "validation": validation, "test": test}
        text = text or recipe.text
        sources = [source for source in splits.values() if source is not None]
        if len(set(sources)) < len(sources):
            raise ConfigError(
                "two of train, validation and test are the same source: an editor must be evaluated on requests that "
                "it was not trained on"
            )
        files = {split: local_file(source) for split, source in splits.items() if source is not None}
        files["text"] = None if text is None or text.startswith(HUB_PREFIX) else text
        missing = [f"--model, {recipe.needs}"] if model is None and recipe.model is None else []
        missing += [
            f"--{option}, since there is no file {file} here{recipe.origin(file)}"
            for option, file in files.items()
            if file is not None and not Path(file).is_file()
        ]
        if missing:
            listed = "\n".join(f"- {line}" for line in missing)
            raise ConfigError(f"the recipe {recipe.name} needs these inputs:\n{listed}")
        return RunInputs(model or str(recipe.model), writer or recipe.writer, train, validation, test, text)

    def to_json(self) -> dict[str, str | None]:
        """Return the inputs as a JSON object."""
        return asdict(self)

    def passages(self) -> list[str]:
        """Read the text on which perplexity is measured; empty without one."""
        return [] if self.text is None else read_text(local_path(self.text))


def load_model(recipe: Recipe, name: str, device: str) -> Task:
    """Load the model that a recipe edits.

    Raises:
        ConfigError: it is of another kind than the recipe is for.
        ModelError: it cannot be loaded.
    """
    task = load(name, device, getattr(torch, recipe.dtype))
    if task.kind != recipe.task:
        raise ConfigError(
            f"the recipe {recipe.name} is for a {recipe.task} model, but {name} is loaded as a "
            f"{type(task.model).__name__}, a {task.kind} model: give another --model (model=)"
            + (f", {recipe.needs}" if recipe.needs else f", such as {recipe.model}, or take another recipe")
        )
    return task


class RequestLoader:
    """Reads the requests of a run, and stores those that a model writes so that a resumed run reads them again.

    Args:
        recipe: names how many requests each split has.
        inputs: the model and the sources.
        folder: where requests that a model wrote are stored.
        device: of the writer, if it is another model than the edited one.
        seed: of what is drawn.
        limit: at most so many requests of each split.
    """

    def __init__(
        self, recipe: Recipe, inputs: RunInputs, folder: Path, device: str, seed: int, limit: int | None
    ) -> None:
        self.recipe, self.inputs, self.folder = recipe, inputs, folder
        self.device, self.seed, self.limit = device, seed, limit

    def load(self, task: Task, resume: bool) -> dict[str, list[EditRequest]]:
        """Return the requests of each split that has a source.

        Raises:
            RequestError: a source cannot be read, or holds nothing.
        """
        writer = task
        if self._needs_another_writer():
            writer = load(str(self.inputs.writer), self.device)
        return {
            split: self._read_split(split, source, writer, resume)
            for split in SPLITS
            if (source := getattr(self.inputs, split)) is not None
        }

    def _needs_another_writer(self) -> bool:
        sources = [getattr(self.inputs, split) for split in SPLITS]
        has_passages = any(source is not None and _needs_model(parse_source_name(source)[0]) for source in sources)
        return has_passages and self.inputs.writer is not None and self.inputs.writer != self.inputs.model

    def _read_split(self, split: str, source: str, writer: Task, resume: bool) -> list[EditRequest]:
        recipe_limit = {
            "train": self.recipe.train_requests,
            "validation": self.recipe.validation_requests,
            "test": self.recipe.edits,
        }[split]
        limits = [limit for limit in (recipe_limit, self.limit) if limit is not None]
        count = min(limits) if limits else None
        kind, rest = parse_source_name(source)
        if _needs_model(kind):
            file = self.folder / f"{split}.jsonl"
            if not (resume and file.exists()):
                write_requests(file, list(generation_requests(writer, local_path(rest), count, self.seed)))
            return read_requests(file)
        requests = add_unrelated_prompts(read_source(source), self.seed)
        if count is None or count >= len(requests):
            return requests
        indices = random.Random(f"{self.recipe.name} {split} {self.seed}").sample(range(len(requests)), count)
        return [requests[index] for index in sorted(indices)]


def add_unrelated_prompts(requests: Sequence[EditRequest], seed: int) -> list[EditRequest]:
    """Give each request without unrelated prompts those of other requests, with their true answers as targets.

    The paper draws x_loc from the same data (Alg. 1), and its files of zsRE and FEVER name no unrelated prompts. Where
    no request has a true answer, nothing is added.
    """
    probes: dict[str, Probe] = {}
    for request in requests:
        truth = (request.model_extra or {}).get("ground_truth")
        if isinstance(truth, str) and truth.strip():
            probes.setdefault(request.key, Probe(prompt=request.prompt, target=truth))
    keys = list(probes)
    completed = []
    for number, request in enumerate(requests):
        if not request.locality:
            # One more than needed, since the request's own subject may be among those that are drawn.
            drawn = random.Random(f"lent {seed} {number}").sample(keys, min(UNRELATED_PROMPTS + 1, len(keys)))
            unrelated = tuple(probes[key] for key in drawn if key != request.key)[:UNRELATED_PROMPTS]
            request = request.model_copy(update={"locality": unrelated})
        completed.append(request)
    return completed


def _needs_model(data_set: str | None) -> bool:
    return data_set is not None and DATASETS.get(data_set).needs_model


def shared_with_training(requests: dict[str, list[EditRequest]]) -> dict[str, int]:
    """Count the subjects, prompts and facts that test and training have in common, by kind; empty if there are none."""
    overlap = find_overlap(requests["train"], requests["test"])
    return {kind: len(names) for kind, names in overlap.items() if names}


def local_file(source: str) -> str | None:
    """Return the local file that a source names; None for built-in data and files on the hub."""
    kind, rest = parse_source_name(source)
    if (kind is not None and DATASETS.get(kind).splits) or rest.startswith(HUB_PREFIX):
        return None
    return rest
