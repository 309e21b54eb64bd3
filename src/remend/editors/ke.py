"""KnowledgeEditor: a network reads the pair and says how to bend its gradient (De Cao et al., arXiv 2104.08164)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from remend.config import Config
from remend.core.capture import capture_gradient_factors
from remend.core.low_rank import LowRank
from remend.editors.info import EditorInfo
from remend.editors.trainable import TrainableEditor
from remend.fingerprint import ModelFingerprint, find_modules
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.base import Example, Task
from remend.tasks.generative import GenerativeTask


@dataclass(frozen=True)
class KeConfig(Config):
    """Sizes of the network.

    Attributes:
        hidden: width of the recurrent network, in either direction, and of the layer after it.
    """

    hidden: PositiveInt = 128


class Ke(TrainableEditor):
    """The KnowledgeEditor.

    A bidirectional LSTM reads the embeddings of prompt and target; of what it says, one linear layer for each matrix
    makes α, β ∈ ℝ^d_out, γ, δ ∈ ℝ^d_in and η ∈ ℝ, and the change is (its Eq. 7, as a descent step)

        ΔW = −ε σ(η) (s · d_out · softmax(α) (1 + γ)ᵀ ⊙ ∇W + softmax(β) δᵀ).

    A rank-one gate on a gradient of T tokens gates its factors, so the change is of rank T + 1 and never dense. ε is a
    learned step for each matrix. Beside the original, the gate starts at 1 (that is what d_out and 1 + are for), and s
    is the step at which a token's edit changes its own output by about the output's size, so that it suits any model.
    """

    info: ClassVar[EditorInfo] = EditorInfo("ke", "De Cao et al., EMNLP 2021 (arXiv 2104.08164)", "training")
    config_class: ClassVar[type[Config]] = KeConfig

    def __init__(self, config: KeConfig, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(config, base, shapes)
        self.alpha = nn.Parameter(torch.zeros(len(self.shapes)))
        self.networks = nn.ModuleDict()

    def build(self, task: Task) -> None:
        """The networks' sizes are those of the model's embeddings and labels."""
        width = next(task.model.get_input_embeddings().parameters()).shape[1]
        labels = 0 if task.model.get_output_embeddings() is not None else max(2, task.model.config.num_labels or 0)
        self._build_networks(width, labels)

    def _build_networks(self, width: int, labels: int) -> None:
        hidden = self.config.hidden
        self.networks["reader"] = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.networks["condition"] = nn.Linear(2 * hidden, hidden)
        for place, (d_in, d_out) in enumerate(self.shapes.values()):
            head = nn.Linear(hidden, 2 * (d_in + d_out) + 1)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.networks[f"head_{place}"] = head
        if labels:  # a label has no tokens that could be read
            self.networks["labels"] = nn.Embedding(labels, width)

    def expect(self, tensors: Mapping[str, Tensor]) -> None:
        """The sizes of the model that an editor was saved for."""
        labels = tensors.get("networks.labels.weight")
        self._build_networks(tensors["networks.reader.weight_ih_l0"].shape[1], 0 if labels is None else len(labels))

    def episode_changes(
        self, task: Task, pairs: Sequence[Example], prefix: FrozenPrefix, states: Tensor | None
    ) -> dict[str, LowRank]:
        """The gated gradient of each pair, and its shift: a factor pair for each token after the shift's."""
        batch, modules = task.collate(pairs), find_modules(task.model, self.shapes)
        with prefix.resume_from(states):
            factors = capture_gradient_factors(
                task.model, modules, task.token_masks(batch, self.shapes, False), lambda: task.loss(batch)
            )[1]
        condition = self._condition(task, pairs)
        found = {}
        for place, (name, (d_in, d_out)) in enumerate(self.shapes.items()):
            gate_out, shift_out, gate_in, shift_in, strength = self.networks[f"head_{place}"](condition).split(
                (d_out, d_out, d_in, d_in, 1), 1
            )
            own = factors[name]
            u, delta = own.u.to(self.device), own.delta.to(self.device)
            step = -self.alpha[place].exp() * torch.sigmoid(strength)[:, :, None]
            gated = step * self.unit[place] * d_out * gate_out.softmax(1)[:, None] * delta
            shift = step * shift_out.softmax(1)[:, None]
            found[name] = LowRank(
                torch.cat([shift_in[:, None], (1 + gate_in)[:, None] * u], 1), torch.cat([shift, gated], 1)
            )
        return found

    def _condition(self, task: Task, pairs: Sequence[Example]) -> Float[Tensor, "episode hidden"]:
        """What the reader makes of each prompt and target."""
        reader, table = self.networks["reader"], task.model.get_input_embeddings()
        assert isinstance(reader, nn.LSTM)
        shown = []
        for pair in pairs:
            ids = torch.tensor(
                [*pair.input, *(pair.target if isinstance(task, GenerativeTask) else ())], device=task.device
            )
            with torch.no_grad():
                read = table(ids).detach().float().to(self.device).view(-1, reader.input_size)
            if not isinstance(task, GenerativeTask):
                label = self.networks["labels"](torch.tensor([pair.target[0]], device=self.device))
                read = torch.cat([read, label])
            shown.append(read)
        packed = pack_padded_sequence(
            pad_sequence(shown, batch_first=True), [len(s) for s in shown], True, enforce_sorted=False
        )
        _, (last, _) = reader(packed)
        said: Tensor = torch.tanh(self.networks["condition"](torch.cat([last[0], last[1]], 1)))
        return said
