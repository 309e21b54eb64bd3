"""``EpisodeRunner``: the losses of episodes, each in its own edited model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import fields

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.low_rank import LowRank, layer_names
from remend.core.low_rank_hooks import changes_applied, frozen
from remend.editors.trainable import TrainableEditor
from remend.fingerprint import find_modules
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.base import Task, all_of_row
from remend.training.activation_cache import ActivationCache
from remend.training.config import Resources, TrainingConfig
from remend.training.episodes import EpisodeBatch, EpisodeLosses


class EpisodeRunner:
    """Runs the edited model on episodes, ``micro_batch`` at a time.

    Args:
        task: the base model.
        editor: makes the edits.
        prefix: the blocks below the edited ones.
        activation_cache: what the base model computes of examples.
        config: the settings of the run.
        resources: how it uses memory.

    Attributes:
        micro_batch: the number of episodes that go through the edited model together.
    """

    micro_batch: int

    def __init__(
        self,
        task: Task,
        editor: TrainableEditor,
        prefix: FrozenPrefix,
        activation_cache: ActivationCache,
        config: TrainingConfig,
        resources: Resources,
    ) -> None:
        self.task, self.editor, self.prefix, self.activation_cache = task, editor, prefix, activation_cache
        self.config, self.resources = config, resources

    @torch.no_grad()
    def losses(self, batch: EpisodeBatch) -> EpisodeLosses:
        """Edit the model for every episode; return the losses of its neighbour and its locality example."""
        changes = self.editor.episode_changes(self.activation_cache, batch.edits)
        parts = []
        for index in self._micro_batches(batch):
            selected = {name: change.select(index) for name, change in changes.items()}
            parts.append(self.edited_losses(batch[index], selected))
        columns = (torch.cat([getattr(part, field.name) for part in parts]) for field in fields(EpisodeLosses))
        return EpisodeLosses(*columns)

    def edited_losses(
        self, batch: EpisodeBatch, changes: Mapping[str, LowRank], backward: bool = False
    ) -> EpisodeLosses:
        """Return the losses of each episode's probes in its own edited model, all in one pass.

        Args:
            batch: the episodes.
            changes: the batched changes of their edits.
            backward: whether to run the backward pass, to the changes.
        """
        examples, episodes, distribution = batch.probes(), len(batch), self.task.distribution
        # Targets of all neighbours come first, then those of all locality examples.
        probes = self.task.collate(examples).ordered(range(0, 2 * episodes, 2), range(1, 2 * episodes, 2))
        locality_targets = sum(len(example.target) for example in batch.locality)
        sizes = len(probes.target) - locality_targets, locality_targets
        target, episode = probes.target[: sizes[0]], (probes.row // 2).split(sizes)
        states = self.activation_cache.prefix_states(examples)
        base = self.activation_cache.base_outputs(batch.locality, None if states is None else states[1::2])
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(frozen(self.task.model))
            contexts.enter_context(self.prefix.resume_from(states))
            contexts.enter_context(changes_applied(find_modules(self.task.model, layer_names(changes)), changes))
            if backward and self.resources.recompute:
                contexts.enter_context(self.prefix.checkpoint_activations())
            edit, locality = self.task.outputs(probes).split(sizes)
            losses = EpisodeLosses(
                edit=distribution.loss(edit, target, episode[0], episodes),
                locality=self.locality_loss(base, locality, episode[1], episodes),
                correct=all_of_row(distribution.correct(edit, target), episode[0], episodes),
                unchanged=all_of_row(distribution.unchanged(base, locality), episode[1], episodes),
            )
            if backward:  # inside the contexts: recomputed activations must be those of the edited model too
                self._outer_loss(losses).sum().backward()
        return losses

    def locality_loss(self, base: Tensor, edited: Tensor, episode: Tensor, episodes: int) -> Float[Tensor, " episode"]:
        """Return L_loc of each episode, KL(base ‖ edited) of the outputs at its locality example's targets."""
        return self.task.distribution.divergence(base, edited, episode, episodes)

    def _outer_loss(self, losses: EpisodeLosses) -> Float[Tensor, " episode"]:
        """Return what each episode adds to the batch's mean loss (Eq. 4)."""
        return (self.config.edit_weight * losses.edit + losses.locality) / self.config.batch_size

    def _micro_batches(self, batch: EpisodeBatch) -> list[slice]:
        """Return the episodes of a batch that go through the edited model together."""
        self.activation_cache.micro_batch = 2 * self.micro_batch  # an episode has two examples there
        return [slice(start, start + self.micro_batch) for start in range(0, len(batch), self.micro_batch)]
