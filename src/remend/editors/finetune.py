"""``FineTune`` and ``FineTuneLocal``: fine-tuning on the edit itself, the baseline that every editor must beat.

``finetune`` is the paper's baseline (section 5, appendix B): gradient steps on the edit's own loss until the model
answers with the target, at most 100. With ``kl_weight`` and locality examples it is FT+KL, an oracle: it sees at edit
time what other editors only see in training. ``finetune-local`` is the recipe of Yang et al. (arXiv 2509.22072): one
later down-projection, all requests in shuffled mini-batches, epoch after epoch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from torch import nn

from remend.config import Config
from remend.core.capture import explain_non_finite
from remend.core.dense_change import DenseChange
from remend.core.layers import dimensions, execution_device, weight_of, weight_rms
from remend.core.low_rank import LowRank
from remend.core.low_rank_hooks import changes_applied, frozen
from remend.editors.base import WeightEditor
from remend.editors.info import EditorInfo
from remend.editors.saved_editor import SavedEditor
from remend.errors import ConfigError, FileError, NonFiniteError
from remend.models.editable_matrices import editable_modules
from remend.models.frozen_prefix import FrozenPrefix
from remend.request import SAVED, EditRequest, Probe
from remend.tasks.base import Example, Task, all_of_row

VALUES_AT_ONCE = 2**25
"""Entries of changed matrices that are tuned together: 0.7 GB with gradients, Adam's state and a copy."""

TUNING_BATCH_SIZE = 64
"""Examples that go through the model together."""

FineTuneT = TypeVar("FineTuneT", bound="FineTune")


@dataclass(frozen=True)
class FineTuneConfig(Config):
    """How a model is fine-tuned on an edit.

    Attributes:
        learning_rate: Adam's, as a share of the root mean square of the tuned matrix's entries, so that one setting
            suits models of any scale (the paper chose one for each model).
        steps: passes over the requests, at most.
        until_taken: whether the tuning of a request (of several together: of all) ends when greedy decoding gives the
            target.
        batch_size: requests in a step, where several are tuned together; 0 for all of them.
        kl_weight: of KL(p_base ‖ p_tuned) on a locality example for each request and step, beside the edit's loss.
        seed: of the order of requests and the choice of locality examples.
    """

    learning_rate: PositiveFloat = 0.01
    steps: PositiveInt = 100
    until_taken: bool = True
    batch_size: NonNegativeInt = 0
    kl_weight: NonNegativeFloat = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until_taken and self.batch_size:
            raise ConfigError(
                "until_taken looks at all requests in every step, so they cannot be tuned in batches: set until_taken "
                "to False, or batch_size to 0"
            )


class FineTune(WeightEditor):
    """Fine-tunes some matrices on the edit, and returns the difference as an edit.

    Attributes:
        locality: prompts with answers at which the model should stay, for ``kl_weight``.
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "finetune", "Mitchell et al. (arXiv 2110.11309), App. B", "nothing", "dense", batches=True
    )
    config_class: ClassVar[type[Config]] = FineTuneConfig
    batch_size: ClassVar[int | None] = None  # how many are tuned together depends on the matrices' size
    locality: tuple[Probe, ...] = ()

    @classmethod
    def create(
        cls: type[FineTuneT],
        task: Task,
        config: FineTuneConfig | None = None,
        *,
        text: Sequence[str] = (),
        seed: int = 0,
        modules: Sequence[str] = (),
        layers: str | None = None,
        locality: Sequence[EditRequest] = (),
    ) -> FineTuneT:
        """Return the editor, as :meth:`Editor.create`.

        Args:
            task: the model.
            config: the configuration; by default :meth:`default_config`.
            text: refused.
            seed: of the default configuration; one that is given has its own.
            modules: globs of the matrices to tune; by default the MLPs' of the last three blocks.
            layers: the blocks to look in.
            locality: requests whose ``locality`` examples are for ``kl_weight``.

        Raises:
            ModelError: there is nothing to edit, or nothing matches.
            ConfigError: a matrix belongs to several experts, or ``kl_weight`` is set without locality examples.
        """
        editor = super().create(task, config, text=text, seed=seed, modules=modules, layers=layers)
        editor.locality = tuple(probe for request in locality for probe in request.locality)
        if editor.config.kl_weight and not editor.locality:
            raise ConfigError(
                "kl_weight keeps the model at locality examples: give requests that have some, as locality=[…]"
            )
        return editor

    @classmethod
    def default_config(cls, seed: int = 0) -> FineTuneConfig:
        """Return the paper's settings."""
        return FineTuneConfig(seed=seed)

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Tune on all requests together and return what changed."""
        tuning = _Tuning(self, task, [[task.encode(request.prompt, request.target) for request in requests]])
        tuning.run()
        return tuning.changes(0)

    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Tune on each request alone, several at the same time, and return what changed."""
        size = sum(weight_of(module).numel() for module in self.edited_modules(task).values())
        together = max(1, min(TUNING_BATCH_SIZE, VALUES_AT_ONCE // size))
        changes: list[dict[str, LowRank]] = []
        for start in range(0, len(requests), together):
            part = requests[start : start + together]
            tuning = _Tuning(self, task, [[task.encode(request.prompt, request.target)] for request in part])
            tuning.run()
            changes += [tuning.changes(episode) for episode in range(len(part))]
        return changes

    def saved_fields(self) -> dict[str, Any]:
        """Return the locality examples."""
        return {"locality": [probe.model_dump(mode="json") for probe in self.locality]}

    def restore(self, saved: SavedEditor) -> None:
        """Take over the locality examples."""
        super().restore(saved)
        try:
            self.locality = tuple(
                Probe.model_validate_json(json.dumps(p), context=SAVED) for p in saved.field("locality", list)
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise FileError(f"{saved.path}: a locality example is malformed ({reason}); it was altered") from None


class FineTuneLocal(FineTune):
    """Fine-tunes one later down-projection for a number of epochs (Yang et al., arXiv 2509.22072)."""

    info: ClassVar[EditorInfo] = EditorInfo(
        "finetune-local", "Yang et al. (arXiv 2509.22072)", "nothing", "dense", batches=True
    )
    DEPTH: ClassVar[float] = 0.7
    """The depth of the default matrix, as a share of the model's depth."""

    @classmethod
    def select_modules(
        cls, task: Task, config: Any, modules: Sequence[str], layers: str | None
    ) -> dict[str, nn.Module]:
        """Return the matrices to tune; by default one narrowing MLP matrix at :data:`DEPTH` of the model."""
        if not modules and layers is None:
            names = list(editable_modules(task.model, (), outputs_only=True, layers="0.0-1.0"))
            modules = [names[min(len(names) - 1, int(cls.DEPTH * len(names)))]]
        return super().select_modules(task, config, modules, layers)

    @classmethod
    def default_config(cls, seed: int = 0) -> FineTuneConfig:
        """Return the settings of Yang et al."""
        return FineTuneConfig(learning_rate=0.02, steps=30, until_taken=False, batch_size=8, seed=seed)


class _Tuning:
    """Tunes some episodes of one or more examples each, independently and at the same time.

    Args:
        editor: the editor, for its matrices and configuration.
        task: the model; frozen, the change is beside it.
        episodes: the examples of each.
    """

    def __init__(self, editor: FineTune, task: Task, episodes: Sequence[Sequence[Example]]) -> None:
        self.config, self.task, self.episodes = editor.config, task, episodes
        self.modules = editor.edited_modules(task)
        self.prefix = FrozenPrefix(task.model, editor.shapes)
        self.dense = {
            name: DenseChange(dimensions(module), len(episodes), execution_device(module))
            for name, module in self.modules.items()
        }
        # Adam moves each entry by about the learning rate, so that it is set in units of the matrix's entries.
        groups = [
            {"params": [self.dense[name].values], "lr": self.config.learning_rate * weight_rms(module)}
            for name, module in self.modules.items()
        ]
        self.optimizer = torch.optim.Adam(groups)
        self.random = random.Random(f"{self.config.seed} tuning")
        self.locality = [task.encode(probe.prompt, probe.target) for probe in editor.locality]

    def changes(self, episode: int) -> dict[str, LowRank]:
        """Return what the tuning of one episode changed."""
        return {name: dense.single_episode(episode) for name, dense in self.dense.items()}

    def run(self) -> None:
        """Tune all episodes to their end."""
        active = list(range(len(self.episodes)))
        with frozen(self.task.model), torch.enable_grad():
            for _ in range(self.config.steps):
                for examples in self._batches(active):
                    succeeded = self._step(active, examples)
                    if self.config.until_taken:  # a batch of an episode is all of it, then
                        active = [episode for episode, done in zip(active, succeeded, strict=True) if not done]
                if not active:
                    return

    def _batches(self, active: Sequence[int]) -> Iterator[list[Sequence[Example]]]:
        """Yield the examples of each active episode for the steps of one epoch."""
        size = self.config.batch_size
        if len(self.episodes) > 1 or not size:
            yield [self.episodes[episode] for episode in active]
            return
        examples = self.random.sample(self.episodes[0], len(self.episodes[0]))
        for start in range(0, len(examples), size):
            yield [examples[start : start + size]]

    def _step(self, active: Sequence[int], examples: Sequence[Sequence[Example]]) -> list[bool]:
        """Make one step of the active episodes that need it, and tell which of them had succeeded before."""
        before = {name: dense.values.detach().clone() for name, dense in self.dense.items() if self.config.until_taken}
        self.optimizer.zero_grad()
        succeeded: list[bool] = []
        rows, part_size = len(examples[0]), max(1, TUNING_BATCH_SIZE // max(1, len(examples)))
        for start in range(0, rows, part_size):
            part = [episode[start : start + part_size] for episode in examples]
            succeeded_in_part = self._backward(list(active), part, rows)
            succeeded = [a and b for a, b in zip(succeeded or succeeded_in_part, succeeded_in_part, strict=True)]
        self.optimizer.step()
        if self.config.until_taken:
            unfinished = {episode for episode, done in zip(active, succeeded, strict=True) if not done}
            finished = [episode for episode in range(len(self.episodes)) if episode not in unfinished]
            with torch.no_grad():
                # Adam's momentum moves an episode on even where its gradient is zero, so its step is undone.
                for name, dense in self.dense.items():
                    dense.values[finished] = before[name][finished]
        return succeeded

    def _backward(self, active: list[int], examples: Sequence[Sequence[Example]], rows: int) -> list[bool]:
        """Add to the gradients of the active episodes, and tell which of them had succeeded on all these examples."""
        task, distribution = self.task, self.task.distribution
        edits = [example for episode in examples for example in episode]
        locality = self.random.choices(self.locality, k=len(edits)) if self.config.kl_weight else []
        # Each edit example is followed by its locality example, so that episodes stay next to each other in the batch.
        mixed = [example for both in zip(edits, locality, strict=True) for example in both] if locality else edits
        batch, per_edit = task.collate(mixed), 2 if locality else 1
        of_edits = batch.row % per_edit == 0
        with torch.no_grad():
            states = self.prefix.compute_states(lambda: task.outputs(batch)) if self.prefix.depth else None
            with self.prefix.resume_from(states):
                base = task.outputs(batch)[~of_edits] if locality else None
        changes = {name: dense.select(active) for name, dense in self.dense.items()}
        with self.prefix.resume_from(states), changes_applied(self.modules, changes):
            outputs = task.outputs(batch)
        target, row = batch.target[of_edits], batch.row[of_edits] // per_edit
        losses = distribution.loss(outputs[of_edits], target, row, len(edits))
        if base is not None:
            locality_row = batch.row[~of_edits] // per_edit
            divergence = distribution.divergence(base, outputs[~of_edits], locality_row, len(edits))
            losses = losses + self.config.kl_weight * divergence
        if not losses.isfinite().all():
            raise NonFiniteError(
                f"the loss of fine-tuning is not finite: lower learning_rate{explain_non_finite(task.model)}"
            )
        # Divided by the rows of the whole step, so that the gradients of its parts add up to that of the mean.
        (losses.sum() / rows).backward()
        succeeded = all_of_row(distribution.correct(outputs[of_edits], target), row, len(edits))
        result: list[bool] = succeeded.view(len(examples), -1).all(1).tolist()
        return result
