"""``SubjectMend``: MEND where ``fit`` acts, at the subject's last token in a block before the middle of the model.

MEND (Mitchell et al., ICLR 2022) reads the gradient of an edit pair at the last blocks and at the tokens that predict
the target. In a real language model most edits fail there: what is recalled of a subject is settled long before. Here
the networks read the gradient where :class:`remend.editors.locate_then_edit.fit.Fit` finds its values by optimization,
and give that value in a few steps. Where an edit acts is found as there; what it adds is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from remend.config import Config, Factor
from remend.core.capture import capture_gradient_factors
from remend.core.distributed import ProcessGroup
from remend.core.editor_gradients import FactoredGradients
from remend.core.layers import dimensions
from remend.core.low_rank import LowRank
from remend.core.low_rank_hooks import changes_applied, frozen
from remend.core.response import Response
from remend.editors.info import EditorInfo
from remend.editors.locate_then_edit.fit import Fit, FitConfig
from remend.editors.locate_then_edit.subject_finder import find_subject
from remend.editors.locate_then_edit.subject_mentions import lookalikes, mentions
from remend.editors.locate_then_edit.subject_prompts import Located, PromptContexts, located_subject
from remend.editors.locate_then_edit.value_optimization import SubjectBatch
from remend.editors.locate_then_edit.word_end import with_word_ends
from remend.editors.mend.value_network import Inputs, ValueNetwork
from remend.editors.saved_editor import SavedEditor
from remend.editors.trainable import ActivationSource, CalibrationData, TrainableEditor
from remend.errors import ConfigError
from remend.fingerprint import ModelFingerprint
from remend.models.blocks import find_stacks
from remend.models.frozen_prefix import FrozenPrefix, run_until
from remend.request import EditRequest, Prompt
from remend.tasks.base import EDIT_BATCH_SIZE, EncodedInput, Example, Task
from remend.tasks.bfloat16_products import bfloat16_products

SITE = "site."
"""What the names of the site's tensors begin with in a saved editor."""


@dataclass(frozen=True)
class SubjectMendConfig(Config):
    """Settings of the editor.

    Attributes:
        steps: how often a gradient is taken and a network turns it into a part of the value.
        further: the most steps after those, as the last of them, while a prompt is not answered; not in training.
        enough: the −log p(target), in nats a token, below which a prompt is answered.
        rank: the inner width of the network.
        alpha: the initial size of a step, as a share of the block's output at the subject.
        largest: the size to which a value is limited, in the same unit.
        damping: as in :class:`FitConfig`; the network can turn back what it does to a gradient.
        kind: what an edit is made of (:class:`FitConfig`).
        threshold: as in :class:`FitConfig`.
        beta: as in :class:`FitConfig`.
    """

    steps: PositiveInt = 4
    further: NonNegativeInt = 4
    enough: NonNegativeFloat = 0.7
    rank: PositiveInt = 1024
    alpha: PositiveFloat = 0.5
    largest: PositiveFloat = 4.0
    damping: PositiveFloat = 0.3
    kind: Literal["units", "low-rank"] = "units"
    threshold: Factor = 0.7
    beta: PositiveFloat = 20.0

    def of_site(self) -> FitConfig:
        """Return the settings of where and how edits act; no beginnings are read, and no values are optimized."""
        return FitConfig(kind=self.kind, threshold=self.threshold, beta=self.beta, damping=self.damping, beginnings=0)


@dataclass(frozen=True)
class SubjectExample(Example):
    """An edit pair with its subject.

    Attributes:
        position: the position of the subject's last token in the input.
        request: the request, which names the subject.
    """

    position: int
    request: EditRequest = field(compare=False)

    @property
    def located(self) -> Located:
        """The edit pair with the place of the subject."""
        return self, self.position

    @property
    def prompt(self) -> tuple[EncodedInput, int]:
        """The encoded prompt with the place of the subject."""
        return self.input, self.position


class SubjectMend(TrainableEditor):
    """MEND at the subject's last token: a few gradients there, each turned into a part of the value by a network.

    Attributes:
        site: finds the direction that answers to a subject, and makes the change.
        network: turns gradients into parts of a value.
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "mend-subject",
        "this package, after Mitchell et al., ICLR 2022 (arXiv 2110.11309)",
        "training",
        batches=True,
        sequence="unedited",
        options=("layers",),
        requires={"causal": "it reads the gradient where a decoder has read the subject"},
    )
    config_class: ClassVar[type[Config]] = SubjectMendConfig
    calibrates_on_text: ClassVar[bool] = True

    config: SubjectMendConfig

    def __init__(
        self, config: SubjectMendConfig, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]
    ) -> None:
        super().__init__(config, base, shapes)
        self.site = Fit(config.of_site(), base, shapes)
        self.site.questions = None
        d_in, d_out = self.shapes[self.site.key_layer][0], self.shapes[self.site.changed_layer][1]
        self.network = ValueNetwork(config.steps, d_in, d_out, config.rank)
        self.alpha = nn.Parameter(torch.full((config.steps,), config.alpha))
        self._directions: dict[tuple[EncodedInput, int], Float[Tensor, " d_in"]] = {}

    @classmethod
    def select_modules(
        cls, task: Task, config: Any, modules: Sequence[str], layers: str | None
    ) -> dict[str, nn.Module]:
        """Return the layers of one block's MLP that an edit reads and changes, as :class:`Fit` does.

        Raises:
            ConfigError: the model's embeddings are narrower than its blocks, or ``layers`` does not name one block.
            ModelError: the block has no MLP that can be edited so.
        """
        selected = Fit.select_modules(task, config.of_site(), modules, layers)
        width, states = task.model.get_input_embeddings().weight.shape[1], dimensions(list(selected.values())[-1])[1]
        if width != states:
            raise ConfigError(
                f"mend-subject reads a target's embedding beside hidden states, and this model's have {width} and "
                f"{states} dimensions: use fit, or mend"
            )
        return selected

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Move to the model's device."""
        self.to(task.device)

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether the site was measured, or the editor trained."""
        return bool(self.trained) or hasattr(self.site, "covariances")

    def calibrate(self, source: ActivationSource, data: CalibrationData, process_group: ProcessGroup) -> None:
        """Measure the keys of ordinary text."""
        self.site.measure_site(source.task, data.text, 0)  # the networks learn what else is asked of a subject
        self._directions.clear()

    def replay_calibration(self, source: ActivationSource, data: CalibrationData, process_group: ProcessGroup) -> None:
        """Measure the keys of ordinary text again: checkpoints do not hold them."""
        self.calibrate(source, data, process_group)

    def encode_edit(self, task: Task, request: EditRequest) -> SubjectExample:
        """Return the edit pair of a request, with its subject: its own, or the one found in its prompt."""
        if not (request.subject or "").strip():
            request = request.model_copy(update={"subject": find_subject(task, request.prompt)})
        example, position = located_subject(task, request.prompt, str(request.subject).strip(), request.target)
        return SubjectExample(example.input, example.target, position, request)

    def end_targets(self, task: Task, prompts: Sequence[Prompt], edits: Sequence[Example]) -> list[Example]:
        """Return the edit pairs with the token with which the target's last word ends (:func:`with_word_ends`)."""
        return with_word_ends(task, prompts, edits)

    def episode_changes(
        self, source: ActivationSource, examples: Sequence[Example], factored_gradients: FactoredGradients | None = None
    ) -> dict[str, LowRank]:
        """Return what each edit pair changes; the direction of a prompt's subject is found once in a run."""
        edits = [example for example in examples if isinstance(example, SubjectExample)]
        assert len(edits) == len(examples), "episodes hold what encode_edit returned"
        source.prefix_states(examples)  # a resumed run looks them up, and must find what this one does
        response = self.site.response(source.task)
        for edit in edits:
            if edit.prompt not in self._directions:
                # Only by chance do others have names that end alike in training: nothing is learned from those.
                _, u = self._find_direction(source.task, edit, response, others=False)
                self._directions[edit.prompt] = u
        u = torch.stack([self._directions[edit.prompt] for edit in edits])
        batch = SubjectBatch(source.task, [[edit.located] for edit in edits], source.prefix)
        values = self._values(source.task, edits, batch, u, response)
        return self.site.change(u[:, None], values[:, None], response)

    # -- edit ----------------------------------------------------------------------------------------------------

    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Return what each request changes by itself."""
        response = self.site.response(task)
        _, keys, u, values = self._edits(task, requests, response)
        parts = [slice(number, number + 1) for number in range(len(requests))]
        return [self.site.change_together(keys[part], u[part], values[part], response, [[0]]) for part in parts]

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Return what all requests change together: the values of those about one subject are added up."""
        response = self.site.response(task)
        edits, keys, u, values = self._edits(task, requests, response)
        of_subject: dict[str, list[int]] = {}
        for number, edit in enumerate(edits):
            of_subject.setdefault(edit.request.key, []).append(number)
        summed = torch.stack([values[numbers].sum(0) for numbers in of_subject.values()])
        first = [numbers[0] for numbers in of_subject.values()]
        return self.site.change_together(keys[first], u[first], summed, response, list(of_subject.values()))

    def _edits(
        self, task: Task, requests: Sequence[EditRequest], response: Response
    ) -> tuple[
        list[SubjectExample],
        Float[Tensor, "request d_in"],
        Float[Tensor, "request d_in"],
        Float[Tensor, "request d_out"],
    ]:
        """Return edit pairs, the keys of their subjects, the directions that answer to them, and what to add there."""
        pairs = [self.encode_edit(task, request) for request in requests]
        edits = with_word_ends(task, [request.prompt for request in requests], pairs)
        given = [self._given(task, edit) for edit in edits]
        found = [
            self._find_direction(task, edit, response, given=of_edit)
            for edit, of_edit in zip(edits, given, strict=True)
        ]
        keys, u = (torch.stack(vectors) for vectors in zip(*found, strict=True))
        prefix = FrozenPrefix(task.model, self.shapes)
        values = torch.zeros(len(edits), self.shapes[self.site.changed_layer][1], device=self.device)
        # Those with as many given paraphrases go together.
        for count in sorted({len(of_edit) for of_edit in given}):
            alike = [number for number, of_edit in enumerate(given) if len(of_edit) == count]
            for start in range(0, len(alike), size := max(1, EDIT_BATCH_SIZE // (1 + count))):
                part = alike[start : start + size]
                texts = [[edits[number].located, *given[number]] for number in part]
                batch = SubjectBatch(task, texts, prefix)
                of_part = [edits[number] for number in part]
                values[part] = self._values(task, of_part, batch, u[part], response, self.config.further).detach()
        return edits, keys, u, values

    @staticmethod
    def _given(task: Task, edit: SubjectExample) -> list[Located]:
        """Return a request's given paraphrases, with the target of its edit pair, and the places of its subject."""
        subject, target = str(edit.request.subject).strip(), edit.request.target
        located = [located_subject(task, prompt, subject, target) for prompt in edit.request.given_paraphrases]
        return [(replace(example, target=edit.target), position) for example, position in located]

    @torch.no_grad()
    def _find_direction(
        self,
        task: Task,
        edit: SubjectExample,
        response: Response,
        others: bool = True,
        given: Sequence[Located] = (),
    ) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_in"]]:
        """Return the key of an edit pair's subject, and the direction that answers to it with 1.

        Args:
            task: the model.
            edit: the edit pair.
            response: how units answer.
            others: whether names that end alike are answered with 0.
            given: paraphrases that are given with it.
        """
        located = [edit.located, *given, *mentions(task, edit.request)]
        alike = tuple(lookalikes(task, edit.request)) if others else ()
        keys = self.site.keys_at(task, self.site.key_layer, located)
        key, u = self.site.direction(task, keys, PromptContexts((), lookalikes=alike), response)
        return key.to(self.device), u.to(self.device)

    def _values(
        self,
        task: Task,
        edits: Sequence[SubjectExample],
        batch: SubjectBatch,
        u: Float[Tensor, "edit d_in"],
        response: Response,
        further: int = 0,
    ) -> Float[Tensor, "edit d_out"]:
        """Return what each edit adds, differentiable in the networks' parameters, not through the gradients.

        Of several prompts of an edit the networks read the mean gradient, and all of them have to be answered.

        Args:
            task: the model.
            edits: the edit pairs.
            batch: the prompts of each: its own, and given paraphrases.
            u: the direction that answers to each one's subject.
            response: how units answer.
            further: the most steps after those of training, for prompts that are not answered.
        """
        rows, count = batch.batch.rows, batch.rows_per_request
        at_subject = (torch.arange(rows), batch.positions.cpu())
        mask = torch.zeros(rows, batch.length, dtype=torch.bool)
        mask[at_subject] = True
        modules, changed = self.edited_modules(task), self.site.changed_layer

        def mean(of_rows: Float[Tensor, "row d"]) -> Float[Tensor, "edit d"]:
            return of_rows.float().to(self.device).view(len(edits), count, -1).mean(1)

        stream, middle = self._states_above(batch)
        unit = batch.prompts_alone(stream[at_subject].float().to(self.device)).square().mean(1, keepdim=True).sqrt()
        answer = mean(middle[at_subject[0], batch.batch.first_position.cpu()])
        target = self._embedded_targets(task, edits)
        natural_gradient = self.site.natural_gradient()

        value = torch.zeros(len(edits), self.shapes[changed][1], device=self.device)
        with bfloat16_products(task) as narrow:
            batch = batch.on(narrow)

            def loss() -> Tensor:
                targets = batch.batch
                return task.distribution.loss(batch.outputs_resumed(), targets.target, targets.row, rows)

            for step in range(self.config.steps + further):
                u_of_rows, added = (each.repeat_interleave(count, 0) for each in (u, unit * value.detach()))
                current = self.site.change(u_of_rows[:, None], added[:, None], response)
                with changes_applied(modules, current):
                    losses, factors = capture_gradient_factors(task.model, modules, dict.fromkeys(modules, mask), loss)
                losses = losses.float().to(self.device).view(len(edits), count)
                active = (losses > self.config.enough).any(1) | (step < self.config.steps)
                if not active.any():
                    break
                key, delta = (
                    mean(factor[at_subject]) for factor in (factors[self.site.key_layer].u, factors[changed].delta)
                )
                inputs = Inputs(key, natural_gradient(unit * delta), value.detach(), target, answer, losses.mean(1))
                value = torch.where(active[:, None], self._moved(value, inputs, step), value)
        return unit * value

    def _moved(self, value: Float[Tensor, "edit d_out"], inputs: Inputs, step: int) -> Float[Tensor, "edit d_out"]:
        """Return values after a step, in units of the stream."""
        network = min(step, self.config.steps - 1)
        moved = value - self.alpha[network] * self.network(inputs, network)
        size = moved.square().mean(1, keepdim=True).sqrt()
        limited: Tensor = moved * (self.config.largest / size.clamp(min=self.config.largest))
        return limited

    @torch.no_grad()
    def _states_above(self, batch: SubjectBatch) -> list[Float[Tensor, "row token d"]]:
        """Return the hidden states that leave the edited block, and those in the middle of the model."""
        blocks = [block for _, block in find_stacks(batch.task.model)[0][1]]
        above = min(blocks.index(self.site.block_of(batch.task, self.site.changed_layer)) + 1, len(blocks) - 1)
        with frozen(batch.task.model):
            return [run_until(blocks[n], batch.outputs_resumed) for n in (above, max(above, len(blocks) // 2))]

    def _embedded_targets(self, task: Task, edits: Sequence[SubjectExample]) -> Float[Tensor, "request d"]:
        """Return the mean embedding of each target's tokens."""
        embeddings = task.model.get_input_embeddings()
        with torch.no_grad():
            means = [embeddings(torch.tensor(edit.target, device=task.device)).float().mean(0) for edit in edits]
        return torch.stack(means).to(self.device)

    # -- save and load -------------------------------------------------------------------------------------------

    def saved_fields(self) -> dict[str, Any]:
        """Return what training recorded, and what the site holds."""
        return {**super().saved_fields(), **self.site.saved_fields()}

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers, and what the site measured."""
        site = {f"{SITE}{name}": tensor for name, tensor in self.site.saved_tensors().items()}
        return {**super().saved_tensors(), **site}

    def restore(self, saved: SavedEditor) -> None:
        """Take over parameters, buffers, what training recorded and what the site measured."""
        of_site = {name.removeprefix(SITE): t for name, t in saved.tensors.items() if name.startswith(SITE)}
        own = {name: tensor for name, tensor in saved.tensors.items() if not name.startswith(SITE)}
        self.site.restore(replace(saved, tensors=of_site))
        super().restore(replace(saved, tensors=own))
