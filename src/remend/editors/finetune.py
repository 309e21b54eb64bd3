"""Fine-tuning on the edit itself: the methods that every editor must beat.

``finetune`` is the paper's baseline (section 5, appendix B): gradient steps on the edit's own loss until the model
answers with the target, at most 100. With ``kl_weight`` and locality examples it is FT+KL, an oracle: it sees at edit
time what other editors only see in training. ``finetune-local`` is the recipe of Yang et al. (arXiv 2509.22072): one
later down-projection, all requests in shuffled mini-batches, epoch after epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel

from remend.config import Config
from remend.core.capture import explain_non_finite
from remend.core.dense_change import DenseChange
from remend.core.hooks import changes_applied, frozen
from remend.core.layers import dimensions, execution_device, expert_count, weight_of, weight_rms
from remend.core.losses import locality_loss, target_loss
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.editors.info import EditorInfo, checked, refuse_unused
from remend.errors import ConfigError, NonFiniteError
from remend.fingerprint import ModelFingerprint, find_modules
from remend.models.frozen_prefix import FrozenPrefix
from remend.models.structure import editable_modules
from remend.request import EditRequest
from remend.tasks.base import Example, Task

VALUES_AT_ONCE = 2**25
"""Entries of changed matrices that are tuned together: 0.7 GB with gradients, Adam's state and a copy."""
ROWS_AT_ONCE = 64
"""Pairs that go through the model together."""


@dataclass(frozen=True)
class FineTuneConfig(Config):
    """How a model is fine-tuned on an edit.

    Attributes:
        learning_rate: Adam's, as a share of the root mean square of the tuned matrix's entries, so that one setting
            suits models of any scale (the paper chose one for each model).
        steps: passes over the requests, at most.
        until_taken: whether a request's (of several together: all requests') tuning ends when greedy decoding gives the
            target.
        batch_size: requests a step, of several that are tuned together; 0: all of them.
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


class FineTune:
    """Fine-tunes some matrices on the edit, and hands over the difference as an edit.

    Attributes:
        config: its settings.
        base: the model it is for.
        names: the matrices that are tuned.
        locality: prompts with answers at which the model should stay, for ``kl_weight``.
    """

    traits: ClassVar[EditorInfo] = EditorInfo(
        "finetune", "Mitchell et al. (arXiv 2110.11309), App. B", "nothing", "dense", True
    )

    def __init__(
        self, config: FineTuneConfig, base: ModelFingerprint, names: Sequence[str], locality: Sequence[EditRequest] = ()
    ) -> None:
        self.config, self.base, self.names = config, base, tuple(names)
        self.locality = [probe for request in locality for probe in request.locality]
        if config.kl_weight and not self.locality:
            raise ConfigError("kl_weight keeps the model at locality examples: give requests that have some")

    @classmethod
    def create(
        cls,
        task: Task,
        config: FineTuneConfig | None = None,
        *,
        text: Sequence[str] = (),
        seed: int = 0,
        modules: Sequence[str] = (),
        layers: str | None = None,
        locality: Sequence[EditRequest] = (),
    ) -> FineTune:
        """The editor for ``model``; by default of the matrices of :meth:`usual`.

        Args:
            task: the base model.
            config: settings.
            text: not used.
            seed: not used: the configuration has one.
            modules: globs of the matrices to tune.
            layers: the blocks to look in.
            locality: requests whose ``locality`` examples are for ``kl_weight``.

        Raises:
            ModelError: there is nothing to edit, or nothing matches.
            ConfigError: a matrix belongs to several experts, or the settings do not go together.
        """
        refuse_unused(cls.traits.name, text=text)
        if not modules and layers is None:
            modules = cls.usual(task.model)
        chosen = editable_modules(task.model, modules, layers=layers)
        if several := [name for name, module in chosen.items() if expert_count(module)]:
            raise ConfigError(
                f"{several[0]} holds several experts' matrices, of which tuning would change all, also those that the "
                "edit never reaches: name other matrices (attention's, say), or use MEND"
            )
        return cls(config or cls.default(), ModelFingerprint.of(task.model, chosen), tuple(chosen), locality)

    @classmethod
    def usual(cls, model: PreTrainedModel) -> Sequence[str]:
        """The matrices that are tuned where none are named: those that MEND edits, the MLPs' of the last blocks."""
        return ()

    @classmethod
    def default(cls) -> FineTuneConfig:
        """Settings where none are given."""
        return FineTuneConfig()

    @torch.inference_mode(False)  # a server may have it on
    def edit(self, task: Task, requests: Sequence[EditRequest]) -> Edit:
        """One edit for all ``requests``: the model is tuned on all of them together; it is not changed itself.

        Raises:
            RequestError: there is no request, or one does not fit the model's context.
            WrongBaseError: the editor is for another kind of model.
            NonFiniteError: a loss is not finite, of a model that holds NaN or by too large a learning rate.
        """
        base = checked(self.base, task.model, requests, trained=False)
        run = _Tuning(self, task, [[task.encode(request.prompt, request.target) for request in requests]])
        run.run()
        return Edit(run.changes(0), base, tuple(requests), self._signature())

    @torch.inference_mode(False)
    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> list[Edit]:
        """One edit for each request, each tuned on that alone; batched inside. Errors as :meth:`edit`."""
        base = checked(self.base, task.model, requests, trained=False)
        size = sum(weight_of(module).numel() for module in find_modules(task.model, self.names).values())
        together = max(1, min(ROWS_AT_ONCE, VALUES_AT_ONCE // size))
        found = []
        for start in range(0, len(requests), together):
            some = requests[start : start + together]
            run = _Tuning(self, task, [[task.encode(request.prompt, request.target)] for request in some])
            run.run()
            found += [Edit(run.changes(e), base, (r,), self._signature()) for e, r in enumerate(some)]
        return found

    def _signature(self) -> dict[str, object]:
        return {"name": self.traits.name, **asdict(self.config)}


class FineTuneLocal(FineTune):
    """Fine-tunes one later down-projection for a number of epochs (Yang et al., arXiv 2509.22072)."""

    traits: ClassVar[EditorInfo] = EditorInfo(
        "finetune-local", "Yang et al. (arXiv 2509.22072)", "nothing", "dense", True
    )
    DEPTH: ClassVar[float] = 0.7
    """Where in the depth of the model the matrix lies, where none is named."""

    @classmethod
    def usual(cls, model: PreTrainedModel) -> Sequence[str]:
        """One MLP's narrowing matrix, at :data:`DEPTH` of the model."""
        every = list(editable_modules(model, (), outputs_only=True, layers="0.0-1.0"))
        return [every[min(len(every) - 1, int(cls.DEPTH * len(every)))]]

    @classmethod
    def default(cls) -> FineTuneConfig:
        """Settings where none are given."""
        return FineTuneConfig(learning_rate=0.02, steps=30, until_taken=False, batch_size=8)


class _Tuning:
    """Some episodes of one or more pairs each, tuned independently and at the same time.

    Args:
        editor: what is tuned and how.
        task: the model; frozen, the change is beside it.
        episodes: the pairs of each.
    """

    def __init__(self, editor: FineTune, task: Task, episodes: Sequence[Sequence[Example]]) -> None:
        self.editor, self.config, self.task, self.episodes = editor, editor.config, task, episodes
        self.modules = find_modules(task.model, editor.names)
        self.prefix = FrozenPrefix(task.model, editor.names)
        self.dense = {
            name: DenseChange(dimensions(module), len(episodes), execution_device(module))
            for name, module in self.modules.items()
        }
        groups = [
            {"params": [self.dense[name].values], "lr": self.config.learning_rate * weight_rms(module)}
            for name, module in self.modules.items()
        ]
        self.optimiser = torch.optim.Adam(groups)
        self.draw = random.Random(f"{self.config.seed} tuning")
        self.locality = [task.encode(probe.prompt, probe.target) for probe in editor.locality]

    def changes(self, episode: int) -> dict[str, LowRank]:
        """What one episode's tuning changed."""
        return {name: dense.single_episode(episode) for name, dense in self.dense.items()}

    def run(self) -> None:
        """Tune all episodes to their end."""
        active = list(range(len(self.episodes)))
        with frozen(self.task.model), torch.enable_grad():
            for _ in range(self.config.steps):
                for pairs in self._batches(active):
                    taken = self._step(active, pairs)
                    if self.config.until_taken:  # a batch of an episode is all of it, then
                        active = [episode for episode, own in zip(active, taken, strict=True) if not own]
                if not active:
                    return

    def _batches(self, active: Sequence[int]) -> Iterator[list[Sequence[Example]]]:
        """The pairs of each active episode for the steps of one epoch."""
        size = self.config.batch_size
        if len(self.episodes) > 1 or not size:
            yield [self.episodes[episode] for episode in active]
            return
        pairs = self.draw.sample(self.episodes[0], len(self.episodes[0]))
        for start in range(0, len(pairs), size):
            yield [pairs[start : start + size]]

    def _step(self, active: Sequence[int], pairs: Sequence[Sequence[Example]]) -> list[bool]:
        """One step of the active episodes that need it; which of them had taken before."""
        kept = {name: dense.values.detach().clone() for name, dense in self.dense.items() if self.config.until_taken}
        self.optimiser.zero_grad()
        taken: list[bool] = []
        together = len(pairs) if len(pairs) > 1 else 1
        rows = len(pairs[0])
        for start in range(0, rows, max(1, ROWS_AT_ONCE // together)):
            part = [own[start : start + max(1, ROWS_AT_ONCE // together)] for own in pairs]
            found = self._backward(list(active), part, rows)
            taken = [one and other for one, other in zip(taken or found, found, strict=True)]
        self.optimiser.step()
        if self.config.until_taken:
            still = {episode for episode, own in zip(active, taken, strict=True) if not own}
            done = [episode for episode in range(len(self.episodes)) if episode not in still]
            with torch.no_grad():
                for name, dense in self.dense.items():  # Adam moves on by itself
                    dense.values[done] = kept[name][done]
        return taken

    def _backward(self, active: list[int], pairs: Sequence[Sequence[Example]], rows: int) -> list[bool]:
        """Adds to the gradients of the active episodes; which had taken on all these pairs."""
        own = [pair for some in pairs for pair in some]
        others = self.draw.choices(self.locality, k=len(own)) if self.config.kl_weight else []
        mixed = [pair for both in zip(own, others, strict=True) for pair in both] if others else own
        batch, each = self.task.collate(mixed), 2 if others else 1
        edits = batch.row % each == 0
        with torch.no_grad():
            states = self.prefix.compute_states(lambda: self.task.outputs(batch)) if self.prefix.depth else None
            with self.prefix.resume_from(states):
                base = self.task.outputs(batch)[~edits] if others else None
        changes = {name: dense.select(active) for name, dense in self.dense.items()}
        with self.prefix.resume_from(states), changes_applied(self.modules, changes):
            logits = self.task.outputs(batch)
        target, row = batch.target[edits], batch.row[edits] // each
        losses = target_loss(logits[edits], target, row, len(own))
        if base is not None:
            there = batch.row[~edits] // each
            losses = losses + self.config.kl_weight * locality_loss(base, logits[~edits], there, len(own))
        if not losses.isfinite().all():
            raise NonFiniteError(
                f"the loss of tuning is not finite: lower learning_rate{explain_non_finite(self.task.model)}"
            )
        (losses.sum() / rows).backward()
        right: Tensor = torch.ones(len(own), dtype=torch.bool, device=row.device)
        right[row[logits[edits].argmax(-1) != target]] = False
        taken: list[bool] = right.view(len(pairs), -1).all(1).tolist()
        return taken
