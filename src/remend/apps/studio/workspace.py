"""``Desk``: one model that several people look at, each with edits of their own. No web page is needed for it."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remend.apps.acceptance import STANDARD, AcceptanceCriteria, AcceptanceResult
from remend.apps.patch_registry import Conflict, Entry, PatchRegistry
from remend.core.capture import record_inputs
from remend.core.hooks import frozen
from remend.edit import Edit
from remend.errors import EditError, RemendError, RequestError
from remend.evaluation.before_after import AnswerComparison, ask, before_after
from remend.fingerprint import find_modules
from remend.registries import FORMATS
from remend.request import EditRequest, Prompt
from remend.tasks import Task

MOST = 32
"""Tokens of an answer, at most."""


@dataclass
class Made:
    """An edit that somebody made and did not put into the book.

    Attributes:
        number: by which it is called in its session.
        edit: the edit.
        answers: to the request's prompts, before and after.
        seconds: from the beginning to the answers.
        on: whether it acts, in its session.
        draft: its number in the book, if it was put there and not accepted.
    """

    number: int
    edit: Edit
    answers: list[AnswerComparison]
    seconds: float
    on: bool = True
    draft: int | None = None

    @property
    def name(self) -> str:
        """What it does, in a line."""
        request = self.edit.requests[0]
        return f"{self.number}: {request.prompt} → {request.target}"


class Workspace:
    """A model, what edits it, and the book of what was accepted.

    Args:
        task: the base model.
        editor: what makes edits.
        book: where accepted edits go; without one nothing can be accepted.
        acceptance: what is asked of an edit before it acts.
    """

    def __init__(
        self,
        task: Task,
        editor: Any,
        book: PatchRegistry | None = None,
        acceptance: AcceptanceCriteria = STANDARD,
    ) -> None:
        self.task, self.model, self.editor, self.book = task, task.model, editor, book
        self.acceptance = acceptance
        self._lock = threading.RLock()

    @contextmanager
    def alone(self, edits: Sequence[Edit] = ()) -> Iterator[None]:
        """Within it nobody else uses the model, on which these edits act."""
        with self._lock, ExitStack() as stack:
            for edit in edits:
                stack.enter_context(edit.applied(self.model))
            yield

    def active(self) -> dict[int, Edit]:
        """What acts for everybody: the book's."""
        return self.book.active() if self.book is not None else {}


@contextmanager
def watched(model: torch.nn.Module, heard: Callable[[int], None]) -> Iterator[None]:
    """Within it, ``heard`` is told before each pass of the model how many there were; what it raises ends the work."""
    passes = itertools.count()
    handle = model.register_forward_pre_hook(lambda module, arguments: heard(next(passes)))
    try:
        yield
    finally:
        handle.remove()


class StoppedError(RemendError):
    """The person who waited for something has stopped it."""


class Session:
    """What one person does at a desk; nobody else sees it, until it is accepted into the book.

    Args:
        desk: where.
    """

    def __init__(self, desk: Workspace) -> None:
        self.desk = desk
        self.made: dict[int, Made] = {}
        self._next = 1
        self._stop = threading.Event()
        self._folder: Path | None = None

    def stop(self) -> None:
        """Stop the edit that is being made, before the model's next pass."""
        self._stop.set()

    def acting(self) -> list[Edit]:
        """What acts for this person: the book's edits, and the own ones that are on."""
        return [*self.desk.active().values(), *(own.edit for own in self.made.values() if own.on)]

    def ask(self, prompts: Sequence[Prompt], without: bool = False) -> list[AnswerComparison]:
        """Answers of the model as it is, and with all that acts.

        Args:
            prompts: what to ask.
            without: ask only the model as it is.

        Raises:
            RequestError: there is nothing to ask.
        """
        asked = [prompt for prompt in prompts if not isinstance(prompt, str) or prompt.strip()]
        if not asked:
            raise RequestError("there is nothing to ask: write a prompt")
        acting = [] if without else self.acting()
        with self.desk.alone():
            plain = ask(self.desk.task, None, asked, MOST)
        if not acting:
            return plain
        with self.desk.alone(acting):
            now = ask(self.desk.task, None, asked, MOST)
        return [
            AnswerComparison(a.kind, a.prompt, None, a.before, b.after, None) for a, b in zip(plain, now, strict=True)
        ]

    def make(self, request: EditRequest, told: Callable[[str, int], None] = lambda what, passes: None) -> Made:
        """Make an edit of the base model, and look at what it does on top of all that acts.

        Args:
            request: what to change, with what to look at beside it.
            told: hears of every pass of the model what it is for, after how many others.

        Raises:
            RequestError: the request does not fit the model.
            StoppedError: :meth:`stop` was called.
        """
        self._stop.clear()
        began = time.perf_counter()
        desk = self.desk

        def step(what: str, passes: int) -> None:
            if self._stop.is_set():
                raise StoppedError("it was stopped; nothing was made")
            told(what, passes)

        with desk.alone(), watched(desk.model, lambda passes: step("making the edit", passes)):
            edit = desk.editor.edit(desk.task, [request])
        with desk.alone(self.acting()), watched(desk.model, lambda passes: step("asking the edited model", passes)):
            answers = before_after(desk.task, edit, [request], MOST)[0]
        made = Made(self._next, edit, answers, time.perf_counter() - began)
        self.made[made.number] = made
        self._next += 1
        return made

    def against(self, request: EditRequest) -> list[str]:
        """What acts already and has another answer to a request's prompt."""
        booked = {f"edit {number} of the book": edit for number, edit in self.desk.active().items()}
        own = {f"your edit {made.number}": made.edit for made in self.made.values() if made.on}
        return [
            name
            for name, edit in {**booked, **own}.items()
            if any(other.prompt == request.prompt and other.target != request.target for other in edit.requests)
        ]

    def own(self, number: int) -> Made:
        """One of the own edits.

        Raises:
            EditError: there is none of that number.
        """
        if number not in self.made:
            raise EditError(
                f"there is no edit {number} in this session" + (f"; there are {list(self.made)}" if self.made else "")
            )
        return self.made[number]

    def accept(
        self, number: int, why: str = "", who: str | None = None, force: bool = False
    ) -> tuple[Entry, list[Conflict], AcceptanceResult]:
        """Put an own edit into the book and have it act for everybody, if it passes what is asked of it.

        Raises:
            EditError: there is no book, or the edit is not accepted or does not go together with others; it stays in
                the session, and in the book as a draft.
        """
        made, desk = self.own(number), self.desk
        if desk.book is None:
            raise EditError("no book is open here: start the studio with --book DIR")
        if made.draft is None:
            made.draft = desk.book.add(made.edit, why, who).id
        with desk.alone():
            conflicts, verdict = desk.book.activate(made.draft, desk.task, desk.acceptance, why, who, force)
        del self.made[number]
        return desk.book.entry(made.draft), conflicts, verdict

    def discard(self, number: int) -> None:
        """Forget an own edit."""
        del self.made[self.own(number).number]

    def export(self, edit: Edit, to: str) -> Path:
        """Write an edit in one of the registered formats (``native``, ``peft``, ``merged``, …), packed as one file.

        The file is gone when the session is.
        """
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="remend-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        place = Path(tempfile.mkdtemp(dir=self._folder)) / to
        with self.desk.alone():
            FORMATS.load(to)().write(edit, place, self.desk.task)
        packed = Path(shutil.make_archive(str(place), "zip", place))
        shutil.rmtree(place)
        return packed

    def reactions(self, edit: Edit, prompt: Prompt) -> list[tuple[str, float]]:
        """How strongly an edit acts at each token that the model reads: ‖ΔW x‖ as a share of the largest."""
        return reactions(self.desk, edit, prompt)


def format_choices() -> list[tuple[str, str]]:
    """Return the titles and names of the registered formats, for a drop-down list."""
    return [(entry.title or entry.name, entry.name) for entry in FORMATS]


@torch.no_grad()
def reactions(desk: Workspace, edit: Edit, prompt: Prompt) -> list[tuple[str, float]]:
    """See :meth:`Session.reactions`. Of an encoder-decoder, at the tokens of whatever stack the edit is in."""
    task = desk.task
    target = edit.requests[0].target if edit.requests else "."
    with desk.alone():
        batch = task.collate([task.encode(prompt, target)])
        modules = find_modules(desk.model, edit.changes)
        with frozen(desk.model):
            found = record_inputs(desk.model, modules, batch.rows, lambda: task.outputs(batch))
    ids = batch.inputs["input_ids"][0]
    total: Tensor | None = None
    for name, change in edit.changes.items():
        x, experts = found[name].x, found[name].experts
        if experts is not None or x.dim() != 3:
            continue
        own = change.to(x.device).output_change(x.float())[0].norm(dim=-1).cpu()
        if batch.decoder_mask is not None and len(own) == batch.inputs["decoder_input_ids"].shape[1]:
            ids = batch.inputs["decoder_input_ids"][0]
        total = own if total is None or len(total) != len(own) else total + own
    if total is None or len(total) != len(ids):
        return []
    largest = float(total.max().clamp(min=1e-12))
    texts = [str(desk.task.processor.decode([token])) for token in ids.tolist()]
    return [(text, float(size) / largest) for text, size in zip(texts, total, strict=True)]
