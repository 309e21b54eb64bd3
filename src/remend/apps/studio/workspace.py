"""``Workspace`` and ``Session``: one model that several people edit and ask at once; what the studio's page shows."""

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
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remend.apps.acceptance import STANDARD_CRITERIA, AcceptanceCriteria, AcceptanceResult
from remend.apps.patch_registry import Conflict, PatchEntry, PatchRegistry
from remend.core.capture import record_inputs
from remend.core.low_rank_hooks import frozen
from remend.data.edit_sets import EditSet
from remend.edit import Edit
from remend.editors.locate_then_edit.fit import Fit
from remend.errors import EditError, RemendError, RequestError
from remend.evaluation.before_after import AnswerComparison, ask, before_after
from remend.evaluation.interventions import SharedEdit
from remend.evaluation.ordinary_text import Elsewhere, OrdinaryText
from remend.expansion import ExpandConfig, expand
from remend.fingerprint import find_modules
from remend.registries import FORMATS
from remend.request import EditRequest, Prompt
from remend.staging import readable_write_errors, staging_folder
from remend.tasks import Task

MAX_NEW_TOKENS = 32
"""The longest answer that is decoded, in tokens."""


MAX_CHARACTERS, MAX_LINES = 100_000, 100
"""The most of each text and list of texts that a session takes: far more than anybody asks, and quickly read."""


def check_size(texts: Sequence[str]) -> None:
    """Raise if a list of texts is so long that working on it would keep others waiting.

    Raises:
        RequestError: it has more than :data:`MAX_LINES` texts, or :data:`MAX_CHARACTERS` characters.
    """
    characters = sum(map(len, texts))
    if len(texts) > MAX_LINES or characters > MAX_CHARACTERS:
        raise RequestError(
            f"{len(texts)} lines of {characters} characters are too much at once: at most {MAX_LINES} lines and "
            f"{MAX_CHARACTERS} characters are taken; shorten the text"
        )


@dataclass
class SessionEdit:
    """An edit that was made in a session and is not accepted yet.

    Attributes:
        number: its number in the session.
        edit: the edit.
        answers: the answers to the request's prompts, before and after.
        elsewhere: what the edit by itself changes on ordinary text.
        seconds: the time that making the edit and asking for the answers took.
        active: whether it is active in its session.
        draft: its number in the patch registry, if it was added there and not accepted.
    """

    number: int
    edit: Edit
    answers: list[AnswerComparison]
    elsewhere: Elsewhere
    seconds: float
    active: bool = True
    draft: int | None = None

    @property
    def name(self) -> str:
        """Its number, prompt and target, in one line."""
        request = self.edit.requests[0]
        return f"{self.number}: {request.prompt} → {request.target}"


class Workspace:
    """A model, an editor, and the patch registry of accepted edits.

    Args:
        task: the base model.
        editor: the editor that makes edits.
        registry: the registry that accepted edits are added to; without one, no edit can be accepted.
        criteria: what an edit must meet to be accepted.
    """

    def __init__(
        self,
        task: Task,
        editor: Any,
        registry: PatchRegistry | None = None,
        criteria: AcceptanceCriteria = STANDARD_CRITERIA,
    ) -> None:
        self.task, self.model, self.editor, self.registry = task, task.model, editor, registry
        self.criteria = criteria
        self._lock = threading.RLock()

    @contextmanager
    def exclusive(self, edits: Sequence[Edit] = ()) -> Iterator[None]:
        """Lock the model for the ``with`` block, and apply these edits to it meanwhile."""
        with self._lock, ExitStack() as stack:
            for edit in edits:
                stack.enter_context(edit.applied(self.model))
            yield

    @cached_property
    def ordinary_text(self) -> OrdinaryText:
        """What the base model writes by itself; first asked for within :meth:`exclusive`, without edits."""
        return OrdinaryText(self.task)

    @property
    def takes_sets(self) -> bool:
        """Whether the editor is fitted to what is given with a request, and the model can make that."""
        return isinstance(self.editor, Fit) and self.task.causal

    def active_edits(self) -> dict[int, Edit]:
        """Return the edits that are active for everybody: those of the registry, by number."""
        return self.registry.active() if self.registry is not None else {}


@contextmanager
def count_forward_passes(model: torch.nn.Module, callback: Callable[[int], None]) -> Iterator[None]:
    """Call ``callback`` before each forward pass with the number of passes so far; what it raises ends the work."""
    passes = itertools.count()
    handle = model.register_forward_pre_hook(lambda module, arguments: callback(next(passes)))
    try:
        yield
    finally:
        handle.remove()


class StoppedError(RemendError):
    """The user stopped the work that was in progress."""


class Session:
    """The edits that one person makes in a workspace; nobody else is affected by them until they are accepted.

    Args:
        workspace: the workspace.

    Attributes:
        edits: the edits by number.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.edits: dict[int, SessionEdit] = {}
        self._next_number = 1
        self._stop = threading.Event()
        self._export_folder: Path | None = None

    def stop(self) -> None:
        """Stop the edit that is being made, before the next forward pass."""
        self._stop.set()

    def active_edits(self) -> list[Edit]:
        """Return the edits that are active for this person: the registry's and the session's active ones."""
        of_session = [session_edit.edit for session_edit in self.edits.values() if session_edit.active]
        return [*self.workspace.active_edits().values(), *of_session]

    def ask(self, prompts: Sequence[Prompt], base_only: bool = False) -> list[AnswerComparison]:
        """Return the answers of the base model, and of the model with all active edits.

        Args:
            prompts: the prompts; empty ones are left out.
            base_only: ask only the base model.

        Raises:
            RequestError: there is no prompt.
        """
        prompts = [prompt for prompt in prompts if not isinstance(prompt, str) or prompt.strip()]
        if not prompts:
            raise RequestError("there is nothing to ask: write a prompt")
        check_size([str(prompt) for prompt in prompts])
        edits = [] if base_only else self.active_edits()
        with self.workspace.exclusive():
            base = ask(self.workspace.task, None, prompts, MAX_NEW_TOKENS)
        if not edits:
            return base
        with self.workspace.exclusive(edits):
            edited = ask(self.workspace.task, None, prompts, MAX_NEW_TOKENS)
        return [
            AnswerComparison(a.kind, a.prompt, None, a.before, b.after, None) for a, b in zip(base, edited, strict=True)
        ]

    def make_set(self, request: EditRequest) -> EditSet:
        """Make the set of a request: other ways to ask, what follows, and what must stay; without trial edits.

        Raises:
            ModelError: the model is no decoder.
            RequestError: the prompt names no subject.
        """
        check_size([str(request.prompt), request.target])
        with self.workspace.exclusive():
            return expand(self.workspace.task, request, ExpandConfig(rounds=0)).edit_set

    def create_edit(
        self, request: EditRequest, on_progress: Callable[[str, int], None] = lambda step, passes: None
    ) -> SessionEdit:
        """Make an edit of the base model, and ask the model with it on top of all active edits.

        Args:
            request: what to change, with the prompts to look at.
            on_progress: called before every forward pass with the current step and the number of passes so far.

        Raises:
            RequestError: the request does not fit the model.
            StoppedError: :meth:`stop` was called.
        """
        probes = [probe.prompt for probe in (*request.near, *request.locality)]
        probes += [*request.given_near, *(probe.prompt for probe in request.given_portability)]
        phrasings = (*request.paraphrases, *request.given_paraphrases)
        check_size([str(text) for text in (request.prompt, request.target, *phrasings, *probes)])
        self._stop.clear()
        start = time.perf_counter()
        workspace = self.workspace

        def report(step: str) -> Callable[[int], None]:
            def callback(passes: int) -> None:
                if self._stop.is_set():
                    raise StoppedError("it was stopped; nothing was made")
                on_progress(step, passes)

            return callback

        with workspace.exclusive(), count_forward_passes(workspace.model, report("making the edit")):
            edit = workspace.editor.edit(workspace.task, [request])
        with workspace.exclusive(), count_forward_passes(workspace.model, report("measuring it on ordinary text")):
            elsewhere = workspace.ordinary_text.measure(SharedEdit(workspace.task, edit))[0]
        active = self.active_edits()
        with workspace.exclusive(active), count_forward_passes(workspace.model, report("asking the edited model")):
            answers = before_after(workspace.task, edit, [request], MAX_NEW_TOKENS)[0]
        session_edit = SessionEdit(self._next_number, edit, answers, elsewhere, time.perf_counter() - start)
        self.edits[session_edit.number] = session_edit
        self._next_number += 1
        return session_edit

    def contradicting(self, request: EditRequest) -> list[str]:
        """Return the names of the active edits that have another target for a request's prompt."""
        task = self.workspace.task
        prompt = task.encode_input(request.prompt)
        registered = {f"edit {number} of the book": edit for number, edit in self.workspace.active_edits().items()}
        of_session = {f"your edit {number}": entry.edit for number, entry in self.edits.items() if entry.active}
        return [
            name
            for name, edit in {**registered, **of_session}.items()
            if any(
                task.encode_input(r.prompt) == prompt and not task.same_target(r.prompt, r.target, request.target)
                for r in edit.requests
            )
        ]

    def get(self, number: int) -> SessionEdit:
        """Return one of the session's edits.

        Raises:
            EditError: there is no edit of that number.
        """
        if number not in self.edits:
            raise EditError(
                f"there is no edit {number} in this session" + (f"; there are {list(self.edits)}" if self.edits else "")
            )
        return self.edits[number]

    def accept(
        self, number: int, why: str = "", who: str | None = None, force: bool = False
    ) -> tuple[PatchEntry, list[Conflict], AcceptanceResult]:
        """Add an edit of the session to the patch registry and activate it for everybody, if it is accepted.

        Args:
            number: the edit's number in the session.
            why: the reason, for the record.
            who: who accepts it; by default the user of this process.
            force: activate it also if it fails or conflicts.

        Returns:
            The edit's record, its conflicts with other edits, and the acceptance result.

        Raises:
            EditError: there is no registry, or the edit is not accepted or conflicts with others. It then stays in the
                session, and in the registry as a draft.
        """
        session_edit, workspace = self.get(number), self.workspace
        registry = workspace.registry
        if registry is None:
            raise EditError("no book is open here: start the studio with --book DIR")
        if session_edit.draft is None:
            session_edit.draft = registry.add(session_edit.edit, why, who).id
        with workspace.exclusive():
            conflicts, result = registry.activate(
                session_edit.draft, workspace.task, workspace.criteria, why, who, force
            )
        del self.edits[number]
        return registry.entry(session_edit.draft), conflicts, result

    def discard(self, number: int) -> None:
        """Delete an edit from the session."""
        del self.edits[self.get(number).number]

    def export(self, edit: Edit, to: str) -> Path:
        """Write an edit in one of the registered formats (``native``, ``peft``, ``merged``, …) as a zip file.

        The file is deleted with the session.
        """
        if self._export_folder is None:
            temporary, end = Path(tempfile.gettempdir()), ExitStack()
            with readable_write_errors(temporary):  # what a studio left there that was killed is removed
                self._export_folder = end.enter_context(staging_folder(temporary))
            weakref.finalize(self, end.close)
        with readable_write_errors(self._export_folder):
            folder = Path(tempfile.mkdtemp(dir=self._export_folder)) / to
            try:
                with self.workspace.exclusive():
                    FORMATS.load(to)().write(edit, folder, self.workspace.task)
                return Path(shutil.make_archive(str(folder), "zip", folder))
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def reactions(self, edit: Edit, prompt: Prompt) -> list[tuple[str, float]]:
        """Return each token that the model reads with how strongly the edit acts there (see :func:`reactions`)."""
        return reactions(self.workspace, edit, prompt)


def format_choices() -> list[tuple[str, str]]:
    """Return the titles and names of the registered formats, for a drop-down list."""
    return [(entry.title or entry.name, entry.name) for entry in FORMATS]


@torch.no_grad()
def reactions(workspace: Workspace, edit: Edit, prompt: Prompt) -> list[tuple[str, float]]:
    """Return each token with how strongly an edit acts there: ‖ΔW x‖, or what units add, as a share of the largest.

    In an encoder-decoder, these are the tokens of the stack that the edit is in. Where the edit cannot be measured by
    token (experts, pooled states), the list is empty.
    """
    task = workspace.task
    target = edit.requests[0].target if edit.requests else "."
    with workspace.exclusive():
        batch = task.collate([task.encode(prompt, target)])
        modules = find_modules(workspace.model, [change.reads or name for name, change in edit.changes.items()])
        with frozen(workspace.model):
            inputs = record_inputs(workspace.model, modules, batch.rows, lambda: task.outputs(batch))
    ids = batch.inputs["input_ids"][0]
    total: Tensor | None = None
    for name, change in edit.changes.items():
        x, experts = inputs[change.reads or name].x, inputs[change.reads or name].experts
        if experts is not None or x.dim() != 3:
            continue
        sizes = change.to(x.device).output_change(x.float())[0].norm(dim=-1).cpu()
        if batch.decoder_mask is not None and len(sizes) == batch.inputs["decoder_input_ids"].shape[1]:
            ids = batch.inputs["decoder_input_ids"][0]
        total = sizes if total is None or len(total) != len(sizes) else total + sizes
    if total is None or len(total) != len(ids):
        return []
    largest = float(total.max().clamp(min=1e-12))
    texts = [str(task.processor.decode([token])) for token in ids.tolist()]
    return [(text, float(size) / largest) for text, size in zip(texts, total, strict=True)]
