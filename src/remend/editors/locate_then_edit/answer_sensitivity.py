"""``AnswerSensitivity``: how strongly a model's answers to common questions move with what is added at a subject.

A value that makes the model say something else about a subject should leave what it says to other questions as it is.
Near the unedited model, what the addition of v at the subject changes there is ½ vᵀFv, as a divergence KL(p ‖ p_v),
where F is the Fisher information of the answers. It is about the same for all subjects, so it is measured once. A step
along (F + λ)⁻¹g is the one that lowers a loss with the gradient g the most for what it changes elsewhere (natural
gradient; Amari, 1998), here for questions that no request mentions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.layers import dimensions
from remend.core.low_rank_hooks import frozen
from remend.editors.locate_then_edit.common_questions import FRAMES_AT_ONCE, frames, reference_subjects
from remend.editors.locate_then_edit.subject_prompts import located_subject
from remend.editors.locate_then_edit.value_optimization import SubjectBatch, add_at_subject
from remend.models.frozen_prefix import FrozenPrefix
from remend.progress import report_progress
from remend.tasks.base import Task
from remend.tasks.bfloat16_products import bfloat16_products

SUBJECTS = 4
"""Reference subjects about which all statements are read."""


@dataclass(frozen=True, eq=False)
class AnswerSensitivity:
    """The Fisher information of a model's answers at a subject, as a sample of gradients with that second moment.

    Attributes:
        gradients: the gradients of each statement, with each of some reference subjects.
    """

    gradients: Float[Tensor, "statement subject d"]

    @classmethod
    def measure(cls, task: Task, module: nn.Module, seed: int) -> AnswerSensitivity:
        """Sample gradients of the next token after each common statement, with respect to a module's output.

        Args:
            task: a decoder.
            module: the module, to whose output at the subject's last token values are added.
            seed: of the samples.
        """
        statements, subjects = frames("statements"), reference_subjects()[::2][:SUBJECTS]
        generator = torch.Generator(device=task.device).manual_seed(seed)
        parts: list[Tensor] = []
        with frozen(task.model), bfloat16_products(task) as narrow:
            for start in range(0, len(statements), FRAMES_AT_ONCE):
                report_progress("measuring how answers move", start, len(statements))
                part = statements[start : start + FRAMES_AT_ONCE]
                texts = [[located_subject(narrow, f.about(s), s)] for f in part for s in subjects]
                batch = SubjectBatch(narrow, texts, FrozenPrefix(task.model, []))
                parts.append(_sample(batch, module, generator).cpu().unflatten(0, (len(part), len(subjects))))
        return cls(torch.cat(parts))

    def natural_gradient(self, damping: float, without: Collection[str] = ()) -> Callable[[Tensor], Tensor]:
        """Return what turns a gradient g into λ(F + λ)⁻¹g: less of it where answers to other questions are sensitive.

        Args:
            damping: λ, as a share of the mean eigenvalue of F.
            without: the questions that may be answered otherwise.
        """
        asked = [frame.question not in without for frame in frames("statements")]
        g = self.gradients[torch.tensor(asked)].flatten(0, 1).double()
        # By the matrix inversion lemma in the samples, of which there are fewer than dimensions in large models.
        system = g @ g.mT
        ridge = (damping * system.trace() / g.shape[1]).clamp(min=torch.finfo(torch.float64).tiny)
        factor = torch.linalg.cholesky(system + ridge * torch.eye(len(g), dtype=torch.float64))

        def damp(gradient: Float[Tensor, "*row d"]) -> Float[Tensor, "*row d"]:
            rows = gradient.double().cpu().view(-1, g.shape[1])
            return (rows - torch.cholesky_solve(g @ rows.mT, factor).mT @ g).view_as(gradient).to(gradient)

        return damp


def _sample(batch: SubjectBatch, module: nn.Module, generator: torch.Generator) -> Float[Tensor, "row d"]:
    """Return one gradient of each row, whose second moment is the Fisher information of its next token."""
    offsets = torch.zeros(batch.requests, dimensions(module)[1], device=batch.row.device, requires_grad=True)
    with torch.enable_grad():
        with add_at_subject(module, batch, offsets):
            outputs = batch.outputs().float()
        p = outputs.detach().softmax(-1)
        noise = torch.randn(p.shape, generator=generator, device=p.device) * p.sqrt()
        # The Fisher information in the logits is diag(p) − ppᵀ, of which this is a sample.
        weights = noise - p * noise.sum(-1, keepdim=True)
        (gradients,) = torch.autograd.grad((outputs * weights).sum(), [offsets])
    return gradients
