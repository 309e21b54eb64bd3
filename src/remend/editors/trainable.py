"""``TrainableEditor``: what training needs of an editor. Come here to write an editor that ``remend.train`` trains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.capture import GradientFactors, capture_gradient_factors
from remend.core.distributed import ProcessGroup
from remend.core.editor_gradients import FactoredGradients
from remend.core.low_rank import LowRank
from remend.editors.base import WeightEditor
from remend.editors.factor_packing import PackedFactors, pack_active
from remend.editors.saved_editor import SavedEditor
from remend.errors import ConfigError
from remend.fingerprint import ModelFingerprint
from remend.models.frozen_prefix import FrozenPrefix
from remend.request import EditRequest, Prompt
from remend.tasks.base import Batch, Example, Task


@dataclass(frozen=True)
class FactPrompts:
    """A fact of the training set.

    Attributes:
        prompts: the prompts that ask for it.
        near: prompts that are similar to these and ask for other facts.
    """

    prompts: tuple[Example, ...]
    near: tuple[Example, ...]


@dataclass(frozen=True)
class CalibrationData:
    """What an editor is fitted to before the first training step.

    Attributes:
        edits: edit pairs of the training set, in batches.
        facts: the facts that they are about.
        text: passages of ordinary text; empty where none is given.
    """

    edits: Sequence[Sequence[Example]]
    facts: Sequence[FactPrompts] = ()
    text: Sequence[str] = ()


@dataclass(frozen=True)
class ParameterGroups:
    """The parameters of an editor by the learning rate with which they are trained.

    Attributes:
        networks: trained with ``learning_rate``.
        step_sizes: trained with ``alpha_learning_rate``.
    """

    networks: tuple[nn.Parameter, ...]
    step_sizes: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class EditorMemory:
    """The bytes that an editor takes for each episode.

    Attributes:
        activations: what autograd saves in :meth:`TrainableEditor.episode_changes`.
        cached_factors: what is cached of its edit pair.
    """

    activations: float = 0.0
    cached_factors: float = 0.0


@runtime_checkable
class ActivationSource(Protocol):
    """What the frozen base model computes of examples. Training caches it, since it never changes.

    Attributes:
        task: the base model.
        prefix: the blocks below the edited ones.
    """

    task: Task
    prefix: FrozenPrefix

    @property
    def factor_budget(self) -> int:
        """The bytes of packed factors that can be stored."""
        ...

    def prefix_states(self, examples: Sequence[Example]) -> Float[Tensor, "row token *d"] | None:
        """Return the input of the lowest edited block, right-padded with zeros; None if no block is below it."""
        ...

    def gradient_factors(self, examples: Sequence[Example]) -> dict[str, GradientFactors]:
        """Compute the gradient factors of edit pairs at every token; they are not stored."""
        ...

    def packed_factors(self, examples: Sequence[Example]) -> dict[str, PackedFactors]:
        """Return what :meth:`TrainableEditor.pack` makes of the gradient factors of edit pairs."""
        ...

    def put_packed_factors(self, examples: Sequence[Example], packed: Mapping[str, PackedFactors]) -> None:
        """Store the packed factors of edit pairs, so that :meth:`packed_factors` finds them."""
        ...


class TrainableEditor(nn.Module, WeightEditor):
    """An editor whose changes are a differentiable function of edit pairs, through which it is trained.

    A subclass has :meth:`episode_changes` and :meth:`calibrate` beside what every editor has.

    Attributes:
        config: its configuration, which cannot be replaced: the parameters were made from it.
        base: the model that it is for.
        shapes: (d_in, d_out) of each edited matrix, by name.
        trained: what its training recorded (settings, steps, seconds, validation history); empty before.
        alpha: the step sizes.
        reads_packed_factors: whether the changes depend on the base model through :meth:`ActivationSource.
            packed_factors` only, which are then cached.
        calibrates_on_text: whether it can be fitted to a text.
        estimates_memory: whether :meth:`memory` tells what it takes. If not, whole batches go through it and the edited
            model at once.
    """

    alpha: nn.Parameter
    reads_packed_factors: ClassVar[bool] = False
    calibrates_on_text: ClassVar[bool] = False
    estimates_memory: ClassVar[bool] = False

    def __init__(self, config: Any, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.config, self.base, self.shapes = config, base, dict(shapes)
        self.trained: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, other than the configuration that the parameters were made from.

        Raises:
            ConfigError: the configuration would be replaced.
        """
        if name == "config" and "config" in self.__dict__:
            raise ConfigError(
                f"the configuration of a {self.info.name} editor is fixed, since its parameters were made from it: "
                "create another editor, or call with_settings, where the editor has it"
            )
        super().__setattr__(name, value)

    @property
    def device(self) -> torch.device:
        """The device of the editor's parameters."""
        return self.alpha.device

    @property
    @abstractmethod
    def fitted(self) -> bool:
        """Whether the editor was fitted to a model, or trained."""

    @property
    def uses_negatives(self) -> bool:
        """Whether the calibration uses near negatives, which are mined where requests name none."""
        return False

    # -- training ------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> ParameterGroups:
        """Return the parameters by learning rate: all, and the step sizes :attr:`alpha`."""
        return ParameterGroups(tuple(p for p in self.parameters() if p is not self.alpha), (self.alpha,))

    @abstractmethod
    def calibrate(self, source: ActivationSource, data: CalibrationData, process_group: ProcessGroup) -> None:
        """Fit the editor to its base model before the first training step.

        Args:
            source: the base model's activations.
            data: what to fit to.
            process_group: the processes of the run, which must all have the same editor afterwards.
        """

    def replay_calibration(self, source: ActivationSource, data: CalibrationData, process_group: ProcessGroup) -> None:
        """Look up in ``source`` what :meth:`calibrate` looked up, in the same order; by default nothing.

        A resumed run then has the same bits cached, since rounding depends on which examples are computed together.
        """
        return

    def encode_edit(self, task: Task, request: EditRequest) -> Example:
        """Return a request's edit pair, as :meth:`episode_changes` takes it.

        Raises:
            RequestError: it does not fit the model's context, or lacks what the editor needs of a request.
        """
        return task.encode(request.prompt, request.target)

    def end_targets(self, task: Task, prompts: Sequence[Prompt], edits: Sequence[Example]) -> list[Example]:
        """Return the edit pairs of some prompts with targets as long as an edit teaches them; by default as they are.

        In training, what is added to a target is taught of a request's paraphrases, too.
        """
        return list(edits)

    @abstractmethod
    def episode_changes(
        self, source: ActivationSource, examples: Sequence[Example], factored_gradients: FactoredGradients | None = None
    ) -> dict[str, LowRank]:
        """Return what each edit pair, as an episode of its own, changes: a batched change of each matrix.

        Differentiable in the editor's parameters.

        Args:
            source: the base model's activations.
            examples: the edit pairs (:meth:`encode_edit`).
            factored_gradients: where the backward pass may put the gradients of large matrices, as factors.
        """

    def capture(
        self, task: Task, batch: Batch, loss: Callable[[], Float[Tensor, " episode"]] | None = None
    ) -> dict[str, GradientFactors]:
        """Capture the gradient factors of each edit pair's loss in the unedited model (paper, Alg. 2, lines 1–2).

        Args:
            task: the base model.
            batch: the edit pairs.
            loss: computes their losses, if the same pass computes something else too.
        """
        modules = self.edited_modules(task)
        tokens = task.token_masks(batch, self.shapes, self.predicting_tokens_only)
        return capture_gradient_factors(task.model, modules, tokens, loss or (lambda: task.loss(batch)))[1]

    @property
    def predicting_tokens_only(self) -> bool:
        """Whether only tokens that predict a target count as carrying gradient."""
        return False

    def pack(self, factors: Mapping[str, GradientFactors]) -> dict[str, PackedFactors]:
        """Return what the editor reads of gradient factors, on its device: those at tokens that carry gradient."""
        return pack_active(factors, self.device)

    def memory(self, ranks: Mapping[str, float]) -> EditorMemory:
        """Return what an episode takes, given the mean number of tokens that carry gradient at each matrix."""
        return EditorMemory()

    def calibration_bytes(self) -> int:
        """Return the most bytes that :meth:`calibrate` takes beside the editor and a pass through the model."""
        return 0

    # -- save and load -------------------------------------------------------------------------------------------

    def saved_fields(self) -> dict[str, Any]:
        """Return what training recorded."""
        return {"trained": self.trained}

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers."""
        return self.state_dict()

    def restore(self, saved: SavedEditor) -> None:
        """Take over parameters, buffers and what training recorded."""
        self.load_state_dict({name: tensor.clone() for name, tensor in saved.tensors.items()})
        self.trained = saved.field("trained", dict)
