"""``SiteSurvey``: where in a model an edit about a subject can act; blocks × tokens of a prompt, as a picture.

Two things make a place good. The inputs of its MLP tell subjects apart, whatever is asked of them, so that an edit can
act on one of them only. And what is changed there changes the answer: with the hidden state of a prompt about another
subject in its place, the model answers as it does about that one (activation patching).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.core.capture import record_inputs
from remend.core.low_rank_hooks import frozen
from remend.disk_cache import load_or_measure
from remend.editors.locate_then_edit.common_questions import bank_hash, frames, next_tokens, reference_subjects
from remend.editors.locate_then_edit.subject_prompts import Located, located_subject
from remend.errors import FileError, ModelError
from remend.fingerprint import find_modules
from remend.models.blocks import find_stacks
from remend.models.editable_matrices import block_mlp
from remend.models.frozen_prefix import FrozenPrefix
from remend.progress import report_progress
from remend.saved_folders import get_field, read_folder, write_folder
from remend.tasks.base import Batch, Task
from remend.tasks.identity import hash_task

TOKENS = ("the subject's last token", "the token after it", "the prompt's last token")
"""The tokens of a prompt at which an edit could act."""

MOST_BLOCKS = 16
"""Blocks that are tried, spread evenly."""

STATEMENTS, PATCHED_STATEMENTS = 12, 4
"""Statements by which subjects are told apart, and those of them, the surest, in which hidden states are exchanged."""

RIDGE = 0.1
"""λ of the least squares that tell subjects apart, as a share of the mean squared length of the inputs."""

ABOUT_AS_LARGE = 0.9
"""The share of the largest product of both measures that the chosen block has at least."""

OTHER_BEGINNING = "Old"
"""The beginning of a name that ends as a subject's does."""

FORMAT = "remend.site-survey/1"
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, eq=False)
class SiteSurvey:
    """How well each place in a model tells subjects apart, and how much of the answer depends on it.

    Attributes:
        blocks: the numbers of the blocks that were tried.
        apart: by how much the direction of a subject answers its own input, in a statement that it was not made of,
            with more than that of any other one, and of names with the same last word: at best 1, the mean over
            subjects and statements.
        moved: the share of prompts whose answer becomes another subject's with the hidden state after the block.
    """

    blocks: tuple[int, ...]
    apart: Float[Tensor, "token block"]
    moved: Float[Tensor, "token block"]

    @classmethod
    def measure(cls, task: Task) -> SiteSurvey:
        """Ask a causal model common questions about well-known subjects.

        Raises:
            ModelError: it is no decoder of several blocks that completes texts, or it knows nothing of the subjects.
        """
        if not (task.causal and task.generates):
            raise ModelError("where an edit can act is measured of decoders that complete texts")
        stack = find_stacks(task.model)[0][1]
        if len(stack) < 3:
            raise ModelError(f"the model has {len(stack)} blocks, too few to choose one")
        count = min(MOST_BLOCKS, len(stack) - 1)
        blocks = sorted({round(i * (len(stack) - 2) / max(1, count - 1)) for i in range(count)})
        statements = _sure_statements(task)
        prompts = _Prompts(task, statements, [*reference_subjects(), *_names_that_end_alike()])
        with torch.no_grad(), frozen(task.model):
            apart = _told_apart(prompts, blocks)
            patched = _Prompts(task, statements[:PATCHED_STATEMENTS], reference_subjects())
            moved = torch.stack([_moved(patched, block, number, blocks) for number, block in enumerate(blocks)], 1)
        return cls(tuple(blocks), apart, moved)

    @classmethod
    def load_or_measure(cls, task: Task) -> SiteSurvey:
        """Return what an earlier run measured of the same model, or measure it and keep it on disk."""
        depends_on = {"survey": FORMAT, "task": hash_task(task), "questions": bank_hash()}
        return load_or_measure(depends_on, cls.load, lambda: cls.measure(task), lambda survey, path: survey.save(path))

    def save(self, path: Path) -> Path:
        """Write the survey to a folder."""
        return write_folder(path, FORMAT, {"blocks": list(self.blocks)}, {"apart": self.apart, "moved": self.moved})

    @classmethod
    def load(cls, path: Path) -> SiteSurvey:
        """Read a survey from a folder.

        Raises:
            FileError: the folder holds none.
        """
        manifest, tensors = read_folder(path, FORMAT)
        blocks = tuple(get_field(manifest, "blocks", list, path))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = (len(TOKENS), len(blocks))
        if shapes != {"apart": wanted, "moved": wanted} or not all(isinstance(block, int) for block in blocks):
            raise FileError(f"{path} holds no survey of {len(blocks)} blocks: make it anew")
        return cls(blocks, tensors["apart"], tensors["moved"])

    @property
    def best(self) -> tuple[int, str]:
        """The place where an edit should act, as the number of a block and the token.

        The token is that with the largest product of both measures, and the block the deepest one where the product is
        about as large: fewer blocks above it have to run for an edit.
        """
        suits = self.apart * self.moved
        token = int(suits.amax(1).argmax())
        alike = (suits[token] >= ABOUT_AS_LARGE * suits[token].max()).nonzero()
        return self.blocks[int(alike.max())], TOKENS[token]

    def picture(self) -> str:
        """Return both measures as rows of bars, one bar for each block."""
        width = max(map(len, TOKENS))
        lines = []
        for title, values in (("subjects told apart", self.apart), ("answers that follow", self.moved)):
            lines.append(f"{title} (0 to 1)")
            for name, row in zip(TOKENS, values.clamp(0, 1).tolist(), strict=True):
                bars = "".join(2 * BARS[min(int(value * len(BARS)), len(BARS) - 1)] + " " for value in row)
                lines.append(f"  {name:{width}}  {bars} best {max(row):.2f}")
        lines.append(f"  {'block':{width}}  {''.join(f'{block:<3}' for block in self.blocks)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the survey as JSON."""
        block, token = self.best
        return {
            "blocks": list(self.blocks),
            "tokens": list(TOKENS),
            "apart": self.apart.tolist(),
            "moved": self.moved.tolist(),
            "best": {"block": block, "token": token},
        }


class _Prompts:
    """Statements about some subjects as a batch: the prompts of a statement follow each other."""

    def __init__(self, task: Task, statements: Sequence[str], subjects: Sequence[str]) -> None:
        self.task, self.statements = task, len(statements)
        located = [_located(task, text, subject) for text in statements for subject in subjects]
        self.batch: Batch = task.collate([example for example, _ in located])
        subject = torch.tensor([position for _, position in located])
        last = torch.tensor([len(example.input) - 1 for example, _ in located])
        self.positions: Int[Tensor, "token prompt"] = torch.stack([subject, subject + 1, last]).to(task.device)
        self.length = self.batch.inputs["input_ids"].shape[1]

    def outputs(self) -> Float[Tensor, "prompt vocabulary"]:
        return self.task.outputs(self.batch)


def _names_that_end_alike() -> list[str]:
    """Return another name for each well-known subject of several words, with the same last word."""
    ends = [subject.split()[-1] for subject in reference_subjects() if " " in subject]
    return [f"{OTHER_BEGINNING} {end}" for end in ends]


def _located(task: Task, statement: str, subject: str) -> Located:
    return located_subject(task, statement.replace("{}", subject), subject)


def _sure_statements(task: Task) -> list[str]:
    """Return statements to which the model has answers that differ from subject to subject, the surest first.

    At least two tokens follow the subject in each, so that the tokens of :data:`TOKENS` are different ones.
    """
    subjects = reference_subjects()
    found: dict[str, str] = {}
    for frame in frames("statements"):
        if frame.question not in found:
            with_room = (len(e.input) - place > 2 for e, place in (_located(task, frame.template, s) for s in subjects))
            if all(with_room):
                found[frame.question] = frame.template
    statements = list(found.values())
    scores: list[float] = []
    for number, statement in enumerate(statements):
        report_progress("asking about well-known subjects", number, len(statements))
        probability, answer = next_tokens(task, [statement.replace("{}", subject) for subject in subjects]).max(1)
        different = len(set(answer.tolist())) / len(subjects)
        scores.append(float(probability.mean()) * different)
    order = sorted(range(len(statements)), key=lambda index: (-scores[index], index))
    return [statements[index] for index in order[:STATEMENTS]]


def _told_apart(prompts: _Prompts, blocks: Sequence[int]) -> Float[Tensor, "token block"]:
    """Return by how much subjects' own directions answer with more than those of others, at each place."""
    task, stack = prompts.task, find_stacks(prompts.task.model)[0][1]
    names = [block_mlp(task.model, stack[block][0]).reads for block in blocks]
    modules = find_modules(task.model, names)
    inputs = record_inputs(task.model, modules, prompts.batch.rows, prompts.outputs)
    margins = torch.zeros(len(TOKENS), len(blocks))
    for column, name in enumerate(names):
        for row, positions in enumerate(prompts.positions):
            keys = inputs[name].at_tokens(positions, prompts.length)[0][:, 0].double().cpu()
            margins[row, column] = _margin(keys.view(prompts.statements, -1, keys.shape[1]))
    return margins


def _margin(keys: Float[Tensor, "statement subject d"]) -> float:
    """Return the mean margin of the subjects' directions in statements that they were not made of."""
    statements, subjects, _ = keys.shape
    flat = keys.flatten(0, 1)
    keys = (keys - flat.mean(0)) / flat.std(0).clamp(min=1e-6)
    margins = []
    for left_out in range(statements):
        known = torch.cat([keys[:left_out], keys[left_out + 1 :]]).flatten(0, 1)
        gram = known @ known.mT
        targets = torch.eye(subjects, dtype=keys.dtype).repeat(statements - 1, 1)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=keys.dtype)
        answers = keys[left_out] @ known.mT @ torch.linalg.solve(gram + ridge, targets)
        others = answers.masked_fill(torch.eye(subjects, dtype=torch.bool), -torch.inf).amax(1)
        own = len(reference_subjects())
        margins.append((answers.diagonal() - others)[:own].clamp(0, 1).mean())
    return float(torch.stack(margins).mean())


def _moved(prompts: _Prompts, block: int, number: int, blocks: Sequence[int]) -> Float[Tensor, " token"]:
    """Return the share of prompts that are answered as those whose hidden state they get after a block."""
    report_progress("exchanging hidden states", number, len(blocks))
    task, subjects = prompts.task, len(reference_subjects())
    prefix = FrozenPrefix(task.model, [f"{find_stacks(task.model)[0][1][block + 1][0]}.mlp"])
    if not prefix.depth:
        raise ModelError("the model cannot be run from one of its blocks on")
    states = prefix.compute_states(prompts.outputs)
    if states.shape[:2] != (prompts.batch.rows, prompts.length):
        raise ModelError("the model's hidden states are not those of prompts and tokens")
    rows = torch.arange(prompts.batch.rows, device=states.device)
    donor = rows // subjects * subjects + (rows % subjects + 1) % subjects
    own = prompts.outputs().argmax(1)
    differ = own != own[donor]
    if not differ.any():
        raise ModelError("the model answers the same about all subjects")
    shares = []
    for positions in prompts.positions.to(states.device):
        patched = states.clone()
        patched[rows, positions] = states[donor, positions[donor]]
        with prefix.resume_from(patched):
            outputs = prompts.outputs()
        follows = outputs.gather(1, own[donor][:, None]) > outputs.gather(1, own[:, None])
        shares.append(follows[differ].float().mean())
    return torch.stack(shares).cpu()
