"""KnowledgeEditor: a network reads the edit pair and gates its gradient (De Cao et al., arXiv 2104.08164)."""

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
from remend.core.low_rank import LowRank
from remend.editors.info import EditorInfo
from remend.editors.learned_gradient_step import GradientStepEditor
from remend.fingerprint import ModelFingerprint
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.base import Example, Task


@dataclass(frozen=True)
class KeConfig(Config):
    """Settings of KE.

    Attributes:
        hidden: the width of the LSTM, in each direction, and of the layer after it.
    """

    hidden: PositiveInt = 128


class Ke(GradientStepEditor):
    """The KnowledgeEditor.

    A bidirectional LSTM reads the embeddings of prompt and target. From its last states, one linear layer for each
    matrix computes α, β ∈ ℝ^d_out, γ, δ ∈ ℝ^d_in and η ∈ ℝ, and the change is (its Eq. 7, as a descent step)

        ΔW = −ε σ(η) (s · d_out · softmax(α) (1 + γ)ᵀ ⊙ ∇W + softmax(β) δᵀ).

    A rank-one gate on a gradient of T tokens gates its factors, so the change is of rank T + 1 and never dense. ε is a
    learned step for each matrix. Two things differ from the original: the gate starts at 1 (hence d_out and 1 +), and s
    is the step at which a token's edit changes its own output by about the output's size, so that it suits any model.
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "ke",
        "De Cao et al., EMNLP 2021 (arXiv 2104.08164)",
        "training",
        requires={"reads_text": "it reads the embeddings of the prompt's tokens"},
    )
    config_class: ClassVar[type[Config]] = KeConfig

    def __init__(self, config: KeConfig, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(config, base, shapes)
        self.alpha = nn.Parameter(torch.zeros(len(self.shapes)))
        self.networks = nn.ModuleDict()

    def build(self, task: Task) -> None:
        """Create the networks, whose sizes are those of the model's embeddings and labels."""
        width = next(task.model.get_input_embeddings().parameters()).shape[1]
        labels = 0 if task.model.get_output_embeddings() is not None else max(2, task.model.config.num_labels or 0)
        self._create_networks(width, labels)

    def build_for(self, tensors: Mapping[str, Tensor]) -> None:
        """Create the networks with the sizes of saved tensors."""
        labels = tensors.get("networks.labels.weight")
        self._create_networks(tensors["networks.reader.weight_ih_l0"].shape[1], 0 if labels is None else len(labels))

    def _create_networks(self, width: int, labels: int) -> None:
        hidden = self.config.hidden
        self.networks["reader"] = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.networks["condition"] = nn.Linear(2 * hidden, hidden)
        for index, (d_in, d_out) in enumerate(self.shapes.values()):
            head = nn.Linear(hidden, 2 * (d_in + d_out) + 1)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.networks[f"head_{index}"] = head
        if labels:  # a label has no tokens whose embeddings could be read
            self.networks["labels"] = nn.Embedding(labels, width)

    def step_changes(
        self, task: Task, examples: Sequence[Example], prefix: FrozenPrefix, states: Tensor | None
    ) -> dict[str, LowRank]:
        """Return the shift of each edit pair and its gated gradient: one factor pair, then one for each token."""
        with prefix.resume_from(states):
            factors = self.capture(task, task.collate(examples))
        condition = self._condition(task, examples)
        changes = {}
        for index, (name, (d_in, d_out)) in enumerate(self.shapes.items()):
            gate_out, shift_out, gate_in, shift_in, strength = self.networks[f"head_{index}"](condition).split(
                (d_out, d_out, d_in, d_in, 1), 1
            )
            u, delta = factors[name].u.to(self.device), factors[name].delta.to(self.device)
            step = -self.alpha[index].exp() * torch.sigmoid(strength)[:, :, None]
            gated = step * self.unit[index] * d_out * gate_out.softmax(1)[:, None] * delta
            shift = step * shift_out.softmax(1)[:, None]
            changes[name] = LowRank(
                torch.cat([shift_in[:, None], (1 + gate_in)[:, None] * u], 1), torch.cat([shift, gated], 1)
            )
        return changes

    def _condition(self, task: Task, examples: Sequence[Example]) -> Float[Tensor, "episode hidden"]:
        """Return the reader's representation of each prompt and target."""
        reader, embeddings = self.networks["reader"], task.model.get_input_embeddings()
        assert isinstance(reader, nn.LSTM)
        sequences = []
        for example in examples:
            tokens = (*example.input, *example.target) if task.generates else example.input
            with torch.no_grad():
                embedded = embeddings(torch.tensor(tokens, device=task.device))
                sequence = embedded.detach().float().to(self.device).view(-1, reader.input_size)
            if not task.generates:
                label = self.networks["labels"](torch.tensor([example.target[0]], device=self.device))
                sequence = torch.cat([sequence, label])
            sequences.append(sequence)
        lengths = [len(sequence) for sequence in sequences]
        packed = pack_padded_sequence(pad_sequence(sequences, batch_first=True), lengths, True, enforce_sorted=False)
        _, (last, _) = reader(packed)
        condition: Tensor = torch.tanh(self.networks["condition"](torch.cat([last[0], last[1]], 1)))
        return condition
