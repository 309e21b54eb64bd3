"""What a matrix should write at a request's subject for the model to recall the target: found by gradient descent.

The v* of ROME (arXiv 2202.05262, section 3.1) and the z of MEMIT (arXiv 2210.07229, Eq. 16) are what the matrix writes
there now and an offset δ, which is tuned; many requests at once, each with an offset of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from remend.config import Config
from remend.core.capture import record_inputs
from remend.core.hooks import frozen, remove_hooks
from remend.core.losses import target_loss
from remend.editors.locate_then_edit.subject_prompts import Reading
from remend.errors import NonFiniteError
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.base import Batch, Task


@dataclass(frozen=True)
class LocateConfig(Config):
    """Settings that ROME and MEMIT share.

    Sizes are shares of what the block gives at the subject, so that one setting suits models of any scale.

    Attributes:
        steps: of Adam on the offsets, at most.
        learning_rate: Adam's, as a share of the root mean square of what the block gives.
        enough: a request's tuning ends when its −log p(target) is below this, in nats a token.
        kl_weight: of KL(p_edited ‖ p_base) of what follows the subject alone: what the model takes it to be.
        decay: of the offset's squared size.
        largest: the size to which an offset is limited.
        beginnings: how many random stretches of text the prompt is read behind, beside by itself.
        floor: what is added to every eigenvalue of the keys' second moment, as a share of their mean, at least.
    """

    steps: PositiveInt = 25
    learning_rate: PositiveFloat = 0.5
    enough: NonNegativeFloat = 0.05
    kl_weight: NonNegativeFloat = 0.0625
    decay: NonNegativeFloat = 0.002
    largest: PositiveFloat = 2.0
    beginnings: NonNegativeInt = 5
    floor: PositiveFloat = 0.01


class Sites:
    """Some requests as a batch, with the place of the subject's last token in each row.

    The rows of one request follow each other, and all requests have as many, as changes of several episodes need it:
    first those in which the target is asked for and then, with a causal model, the subject alone.

    Args:
        task: the model.
        readings: the requests.
        prefix: where the model may be entered.
    """

    def __init__(self, task: Task, readings: Sequence[Reading], prefix: FrozenPrefix) -> None:
        self.task, self.prefix = task, prefix
        self.requests, self.asked = len(readings), len(readings[0].pairs)
        pairs = [pair for own in readings for pair in own.all_pairs]
        self.each = len(pairs) // len(readings)
        self.batch: Batch = task.collate(pairs)
        places = [place for own in readings for place in own.all_places]
        self.places = torch.tensor(places, device=self.batch.row.device)
        self.length = self.batch.inputs["input_ids"].shape[1]
        with torch.no_grad(), frozen(task.model):
            self.states = prefix.compute_states(self.logits) if prefix.depth else None

    def logits(self) -> Float[Tensor, "target answer"]:
        """What the model predicts the targets with."""
        return self.task.outputs(self.batch)

    def resumed(self) -> Float[Tensor, "target answer"]:
        """The same, without the blocks below the edited ones."""
        with self.prefix.resume_from(self.states):
            return self.logits()

    def keys(self, name: str, module: nn.Module) -> Float[Tensor, "request d_in"]:
        """k*: a matrix's input at the subject, the mean over the contexts of each request (ROME, Eq. 3).

        The prompt by itself weighs as much as all the others together: it is what must be answered.
        """
        found = record_inputs(self.task.model, {name: module}, self.batch.rows, self.resumed)[name]
        own = found.at_tokens(self.places, self.length)[0][:, 0]
        alone, *others = own.view(self.requests, self.each, -1)[:, : self.asked].unbind(1)
        return (alone + sum(others) / len(others)) / 2 if others else alone

    def at_subject(self, output: Float[Tensor, "*row_token d"]) -> Float[Tensor, "row d"]:
        """What a module gives at the subject of each row; some models flatten rows and tokens into one axis."""
        places = self.places.to(output.device)
        rows = torch.arange(len(places), device=output.device)
        return output.reshape(len(places), self.length, -1)[rows, places]

    def by_itself(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "request d"]:
        """Of the rows of each request, the first: its prompt by itself."""
        return rows.view(self.requests, self.each, -1)[:, 0]


@contextmanager
def adding(module: nn.Module, sites: Sites, offsets: Float[Tensor, "request d"] | None) -> Iterator[list[Tensor]]:
    """Within the block, ``module`` writes an offset more at each subject; what it wrote there without is collected."""
    written: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        written.append(sites.at_subject(hidden).detach().float())
        if offsets is None:
            return None
        own = offsets.to(hidden.device).repeat_interleave(sites.each, 0)
        flat = hidden.reshape(-1, hidden.shape[-1])
        where = torch.arange(len(own), device=hidden.device) * sites.length + sites.places.to(hidden.device)
        return flat.float().index_add(0, where, own).to(hidden.dtype).view(hidden.shape)

    handle = module.register_forward_hook(add)
    try:
        yield written
    finally:
        remove_hooks([handle])


def tuned(sites: Sites, module: nn.Module, block: nn.Module, config: LocateConfig) -> Float[Tensor, "request d_out"]:
    """δ of each request: added to what ``module`` writes at the subject, it makes the model answer with the target.

    Minimises, for each request, −log p(target) averaged over its contexts, and ``kl_weight`` times the divergence of
    what follows the subject alone (ROME, Eq. 4), and ``decay`` ‖δ‖² / ‖h‖², with h what the module's ``block`` gives
    there. A request that is good enough stays.

    Raises:
        NonFiniteError: the model's loss is NaN or infinite.
    """
    with torch.inference_mode(False), torch.no_grad(), frozen(sites.task.model):
        with adding(block, sites, None) as streams:
            base = sites.resumed()
        stream = sites.by_itself(streams[0])
        usual = stream.norm(dim=1, keepdim=True).clamp(min=1e-6)
        unit = usual / stream.shape[1] ** 0.5
        values = torch.zeros_like(stream)
        optimiser = torch.optim.Adam([values], lr=config.learning_rate)
        going = torch.ones(sites.requests, dtype=torch.bool, device=values.device)
        for _ in range(config.steps):
            values.requires_grad_()
            with torch.enable_grad():
                with adding(module, sites, values * unit):
                    losses, divergence = _losses(sites, sites.resumed(), base)
                decay = config.decay * (values * unit / usual).square().sum(1)
                objective = losses + config.kl_weight * divergence + decay.to(losses.device)
                (values.grad,) = torch.autograd.grad(objective.sum(), [values])
            values.requires_grad_(False)
            if not objective.isfinite().all():
                raise NonFiniteError("the loss of an edit is not finite: the model's weights or activations are not")
            going &= (losses > config.enough).to(going.device)
            if not going.any():
                break
            before = values.clone()
            optimiser.step()
            values *= (config.largest * usual / (values * unit).norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
            values[~going] = before[~going]  # Adam moves on by itself
        found: Tensor = values.detach() * unit
        return found


def _losses(
    sites: Sites, logits: Float[Tensor, "target answer"], base: Float[Tensor, "target answer"]
) -> tuple[Float[Tensor, " request"], Float[Tensor, " request"]]:
    """−log p(target) of each request, and KL(p_edited ‖ p_base) where its subject stands alone (0 where nowhere)."""
    batch, each, asked = sites.batch, sites.each, sites.asked
    counted = batch.row % each < asked
    row = batch.row[counted] // each * asked + batch.row[counted] % each  # without those of subjects alone
    losses = target_loss(logits[counted], batch.target[counted], row, sites.requests * asked)
    losses = losses.view(-1, asked).mean(1)
    if asked == each:
        return losses, torch.zeros_like(losses)
    edited, unedited = (part[~counted].float().log_softmax(-1) for part in (logits, base))
    return losses, (edited.exp() * (edited - unedited)).sum(1)
