"""The studio's web page (Gradio): build it for a workspace and serve it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import gradio as gr
from pydantic import ValidationError
from starlette.middleware import Middleware

from remend.apps.studio import html_fragments
from remend.apps.studio.prompt_suggestions import suggest_prompts
from remend.apps.studio.request_guard import RequestGuard
from remend.apps.studio.workspace import Session, SessionEdit, StoppedError, Workspace, check_size, format_choices
from remend.data.edit_sets import ROLES, EditSet, SetItem
from remend.errors import RemendError, RequestError
from remend.request import EditRequest, Probe
from remend.visible_text import mark_invisible

SESSION_LIFETIME = 6 * 3600
"""Seconds without use after which a session is deleted."""

ARROW = "→"
"""What stands between a prompt and the answer that follows."""


class Sessions:
    """The sessions of all open pages."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._last_used: dict[str, tuple[float, Session]] = {}

    def __call__(self, key: str) -> Session:
        """Return the session of a page, and delete sessions that were not used for :data:`SESSION_LIFETIME`."""
        now = time.monotonic()
        self._last_used = {k: used for k, used in self._last_used.items() if now - used[0] < SESSION_LIFETIME}
        session = self._last_used.get(key, (now, Session(self.workspace)))[1]
        self._last_used[key] = (now, session)
        return session


def build_page(workspace: Workspace, title: str) -> gr.Blocks:
    """Build the page.

    Args:
        workspace: the workspace.
        title: the name of the model.
    """
    sessions = Sessions(workspace)
    # Gradio keeps a copy of every file that it hands out; copies are deleted after a day.
    with gr.Blocks(title=f"remend studio: {title}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        key = gr.State(lambda: uuid.uuid4().hex)
        changed = gr.State(0)
        # Filled in the same response that shows a new edit: whoever sees it can accept it at once.
        active = gr.CheckboxGroup(label="These act", choices=[], elem_id="on", render=False)
        selected = gr.Dropdown(label="The edit to accept, discard or export", choices=[], elem_id="which", render=False)
        name = html_fragments.text_markdown(title)
        gr.Markdown(f"# remend studio\nThe model is **{name}**. What you make is yours alone until you accept it.")
        with gr.Tab("Fix"):
            _fix_tab(sessions, key, [active, selected])
        with gr.Tab("My edits"):
            _edits_tab(sessions, key, changed, active, selected)
        with gr.Tab("The book") as tab:
            _registry_tab(sessions, key, changed, tab)
    blocks: gr.Blocks = page
    return blocks


def serve(
    workspace: Workspace, title: str, host: str = "127.0.0.1", port: int | None = None, password: str | None = None,
    block: bool = True, allowed_hosts: Sequence[str] = (),
) -> gr.Blocks:  # fmt: skip
    """Serve the page, to this machine alone unless ``host`` says otherwise.

    Args:
        workspace: the workspace.
        title: the name of the model.
        host: the address to listen at.
        port: the port; by default the first free one from 7860 on.
        password: if given, the page asks for it (the user's name is ``remend``).
        block: whether to wait until the server ends.
        allowed_hosts: names by which others call the page, if it has other ones than ``host`` and this machine's
            addresses. Requests to other names are refused.
    """
    page = build_page(workspace, title)
    page.queue(default_concurrency_limit=4)
    system = ("ui-sans-serif", "system-ui", "sans-serif")
    page.launch(
        server_name=host,
        server_port=port,
        auth=("remend", password) if password else None,
        share=False,
        inbrowser=False,
        prevent_thread_lock=not block,
        show_error=False,  # of errors that are not remend's: their text would be taken for HTML
        quiet=True,
        footer_links=["gradio", "settings"],
        max_file_size=1,
        app_kwargs={"middleware": [Middleware(RequestGuard, (host, *allowed_hosts))]},
        theme=gr.themes.Default(font=system, font_mono=("ui-monospace", "monospace")),
        css=html_fragments.CSS,
    )
    return page


# -- the parts of the page -------------------------------------------------------------------------------------------


def _fix_tab(sessions: Sessions, key: gr.State, lists: list[gr.CheckboxGroup | gr.Dropdown]) -> None:
    """Build the tab for asking the model, making an edit and seeing what it does; ``lists`` are of *My edits*."""
    prompt = gr.Textbox(value="", label="Ask the model", placeholder="The capital of Canada is", elem_id="prompt")
    ask = gr.Button("Ask", elem_id="ask")
    answers = gr.HTML(elem_id="said")
    target = gr.Textbox(value="", label="The right answer", placeholder="Toronto", elem_id="target")
    with gr.Accordion("What to look at beside it", open=False):
        gr.Markdown("One prompt a line. Paraphrases should follow; near and far prompts must keep their answers.")
        suggest = gr.Button("Suggest some", elem_id="suggest")
        subject = gr.Textbox(value="", label="What it is about", elem_id="subject")
        paraphrases = gr.Textbox(value="", label="Other phrasings", lines=3, elem_id="paraphrases")
        near = gr.Textbox(value="", label="Near prompts", lines=3, elem_id="near")
        far = gr.Textbox(value="", label="Far prompts", lines=3, elem_id="far")
    with gr.Accordion("The set that the edit is fitted to", open=False, visible=sessions.workspace.takes_sets):
        gr.Markdown(
            "One prompt does not say what else should move, and what should not. Make a set, and strike or mend what "
            "is wrong. One prompt a line; after what follows, its answer behind an arrow."
        )
        expand = gr.Button("Make a set", elem_id="expand")
        phrasings = gr.Textbox(value="", label="Asks the same", lines=3, elem_id="phrasings")
        follows = gr.Textbox(value="", label=f"Follows from it: prompt {ARROW} answer", lines=3, elem_id="follows")
        stays = gr.Textbox(value="", label="Must stay", lines=3, elem_id="stays")
    made = gr.State(())
    with gr.Row():
        edit = gr.Button("Edit", variant="primary", elem_id="edit")
        stop = gr.Button("Stop", elem_id="stop")
    status = gr.Markdown(elem_id="told")
    comparison = gr.HTML(elem_id="shown")
    with gr.Accordion("Where the change sits, and what it reacts to", open=False):
        matrices = gr.HTML(elem_id="places")
        reactions = gr.HTML(elem_id="reacts")

    def ask_model(key: str, prompt: str) -> str:
        session = sessions(key)
        return html_fragments.answers_html(session.ask([prompt or ""]), base_only=not session.active_edits())

    def fill_suggestions(prompt: str, subject: str) -> tuple[str, str, str, str]:
        prompts = suggest_prompts(prompt or "", (subject or "").strip())
        paraphrases, near, far = ("\n".join(lines) for lines in (prompts.paraphrases, prompts.near, prompts.far))
        return prompts.subject or subject, paraphrases, near, far

    def make_set(key: str, prompt: str, target: str, subject: str) -> tuple[Any, ...]:
        session = sessions(key)
        edit_set = session.make_set(_read_request(session, prompt, target, subject, "", "", ""))
        texts = ["\n".join(_item_line(item) for item in edit_set.of(role)) for role in ROLES]
        return (edit_set.request.subject, *texts, edit_set.items)

    def create_edit(
        key: str, prompt: str, target: str, subject: str, paraphrases: str, near: str, far: str,
        phrasings: str, follows: str, stays: str, made: Sequence[SetItem],
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        session = sessions(key)
        request = _read_request(session, prompt, target, subject, paraphrases, near, far)
        request = EditSet(request, tuple(_read_items(phrasings, follows, stays, made))).as_request()
        unchanged = (gr.skip(),) * 5
        progress = ("making the edit", 0)

        def on_progress(step: str, passes: int) -> None:
            nonlocal progress
            progress = step, passes

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(session.create_edit, request, on_progress)
            try:
                while not wait([future], timeout=0.3).done:
                    yield f"*{progress[0]}: {progress[1]} passes of the model so far …*", *unchanged
                session_edit = future.result()
            except StoppedError:
                yield "Stopped; nothing was made.", *unchanged
                return
            finally:
                session.stop()  # when the page is closed, Gradio closes this generator: the work must end too
        yield (
            _summary(session, session_edit), html_fragments.answers_html(session_edit.answers),
            html_fragments.matrices_html(session_edit.edit),
            html_fragments.tokens_html(session.reactions(session_edit.edit, request.prompt)), *_list_edits(session),
        )  # fmt: skip

    ask.click(_with_messages(ask_model), [key, prompt], answers)
    prompt.submit(_with_messages(ask_model), [key, prompt], answers)
    suggest.click(_with_messages(fill_suggestions), [prompt, subject], [subject, paraphrases, near, far])
    expand.click(_with_messages(make_set), [key, prompt, target, subject], [subject, phrasings, follows, stays, made])
    inputs = [key, prompt, target, subject, paraphrases, near, far, phrasings, follows, stays, made]
    outputs = [status, comparison, matrices, reactions, *lists]
    edit.click(_with_messages_generator(create_edit), inputs, outputs, show_progress="hidden")
    stop.click(lambda key: sessions(key).stop(), key, None)


def _edits_tab(
    sessions: Sessions, key: gr.State, changed: gr.State, active: gr.CheckboxGroup, selected: gr.Dropdown
) -> None:
    """Build the tab of the session's edits: switch them on and off, compare, accept, discard, export."""
    gr.Markdown("What you made in this session. Those that are ticked act when you ask, for you alone.")
    active.render()  # type: ignore[no-untyped-call]
    prompts = gr.Textbox(value="", label="Ask again, one prompt a line", lines=2, elem_id="again")
    ask = gr.Button("Compare", elem_id="compare")
    comparison = gr.HTML(elem_id="compared")
    selected.render()  # type: ignore[no-untyped-call]
    why = gr.Textbox(value="", label="Why it is right (kept in the book)", elem_id="why")
    with gr.Row():
        accept = gr.Button("Accept into the book", variant="primary", elem_id="accept")
        force = gr.Checkbox(label="even if the checks fail", elem_id="force")
        discard = gr.Button("Discard", elem_id="discard")
    status = gr.Markdown(elem_id="verdict")
    format_name = gr.Dropdown(label="Export as", choices=format_choices(), value="native", elem_id="form")
    export = gr.Button("Export", elem_id="export")
    file = gr.File(label="The file", elem_id="file")

    def set_active(key: str, numbers: list[int]) -> None:
        for number, session_edit in sessions(key).edits.items():
            session_edit.active = number in numbers

    def compare(key: str, prompts: str) -> str:
        return html_fragments.answers_html(sessions(key).ask(_lines(prompts)))

    def accept_edit(key: str, count: int, number: int | None, why: str, force: bool) -> tuple[str, int]:
        entry, conflicts, result = sessions(key).accept(_selected(number), why or "", force=force)
        lines = [
            f"It is edit {entry.id} of *The book* and acts now, for everybody.",
            *(f"- {check.description}" for check in result.checks),
            *(f"- conflict: {html_fragments.text_markdown(conflict.description)}" for conflict in conflicts),
        ]
        return "\n".join(lines), count + 1

    def discard_edit(key: str, count: int, number: int | None) -> tuple[str, int]:
        sessions(key).discard(_selected(number))
        return "Discarded.", count + 1

    def export_edit(key: str, number: int | None, format_name: str) -> str:
        session = sessions(key)
        return str(session.export(session.get(_selected(number)).edit, format_name))

    changed.change(lambda key: _list_edits(sessions(key)), key, [active, selected])
    active.input(set_active, [key, active], None)
    ask.click(_with_messages(compare), [key, prompts], comparison)
    accept.click(_with_messages(accept_edit), [key, changed, selected, why, force], [status, changed])
    discard.click(_with_messages(discard_edit), [key, changed, selected], [status, changed])
    export.click(_with_messages(export_edit), [key, selected, format_name], file)


def _registry_tab(sessions: Sessions, key: gr.State, changed: gr.State, tab: gr.Tab) -> None:
    """Build the tab of the patch registry: accepted edits, switched on and off, and exported as one."""
    workspace = sessions.workspace
    if workspace.registry is None:
        gr.Markdown("No book is open: start the studio with `--book DIR` to accept edits for everybody.")
        return
    registry = workspace.registry
    table = gr.Dataframe(
        headers=["#", "state", "what", "who", "why", "added"], interactive=False, elem_id="book", wrap=True
    )
    number = gr.Dropdown(label="Edit", choices=[], elem_id="number")
    why = gr.Textbox(value="", label="Why", elem_id="book-why")
    with gr.Row():
        activate = gr.Button("Have it act", elem_id="activate")
        revert = gr.Button("Revert", elem_id="revert")
    status = gr.Markdown(elem_id="book-said")
    format_name = gr.Dropdown(label="Export all that act, as", choices=format_choices(), value="native")
    export = gr.Button("Export", elem_id="book-export")
    file = gr.File(label="The file", elem_id="book-file")

    def list_entries(number: int | None = None) -> tuple[Any, Any]:
        entries = registry.entries
        rows, choices = [], []
        for entry in entries:
            requests = "; ".join(f"{r.get('prompt', '…')} → {r.get('target', '…')}" for r in entry.requests)
            requests, who, why = map(mark_invisible, (requests, entry.who, entry.why))
            rows.append([entry.id, entry.state, requests, who, why, entry.added[:16]])
            choices.append((f"{entry.id}: {requests} ({entry.state})", entry.id))
        selected = number if number is not None else max((entry.id for entry in entries), default=None)
        return rows, gr.update(choices=choices, value=selected)

    # Both also clear the exported file, since what was exported is no longer what is active.
    def activate_edit(number: int | None, why: str) -> tuple[Any, ...]:
        with workspace.exclusive():
            registry.activate(_selected(number), workspace.task, workspace.criteria, why or "")
        return f"Edit {number} acts.", *list_entries(number), None

    def revert_edit(number: int | None, why: str) -> tuple[Any, ...]:
        registry.revert(_selected(number), why or "")
        return f"Edit {number} acts no more.", *list_entries(number), None

    def export_active(key: str, format_name: str) -> str:
        edit = registry.edit()
        if edit is None:
            raise RequestError("no edit of the book acts: there is nothing to export")
        return str(sessions(key).export(edit, format_name))

    tab.select(lambda: list_entries(), None, [table, number])
    changed.change(lambda: list_entries(), None, [table, number])
    activate.click(_with_messages(activate_edit), [number, why], [status, table, number, file])
    revert.click(_with_messages(revert_edit), [number, why], [status, table, number, file])
    export.click(_with_messages(export_active), [key, format_name], file)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _list_edits(session: Session) -> tuple[Any, Any]:
    """Return the updates of the lists of *My edits*: those that act, and the one to accept, at first the newest."""
    choices = [(mark_invisible(session_edit.name), number) for number, session_edit in session.edits.items()]
    active = [number for number, session_edit in session.edits.items() if session_edit.active]
    return gr.update(choices=choices, value=active), gr.update(choices=choices, value=max(session.edits, default=None))


def _summary(session: Session, session_edit: SessionEdit) -> str:
    """Say in a line or two what an edit does."""
    success = session_edit.answers[0].ok
    text = "The model takes it." if success else "**The model does not take it.**"
    if session_edit.answers[0].already:
        text += " The unedited model answers so already."
    if not success and (contradicting := session.contradicting(session_edit.edit.requests[0])):
        text += f" What acts already says otherwise: {', '.join(contradicting)}. Switch it off, then ask again."
    locality = [answer for answer in session_edit.answers if answer.kind in ("near", "far")]
    changed = [answer for answer in locality if not answer.ok]
    if changed:
        text += f" {len(changed)} of {len(locality)} prompts that must stay do not."
    text += f" By itself: {session_edit.elsewhere.description}."
    return f"{text} Edit {session_edit.number}, made in {session_edit.seconds:.2f} s: see *My edits*."


def _read_request(
    session: Session, prompt: str, target: str, subject: str, paraphrases: str, near: str, far: str
) -> EditRequest:
    """Return the page's fields as a request; near and far prompts get the base model's answers as targets.

    Raises:
        RequestError: the prompt or the answer is missing.
    """
    prompt, target, subject = ((text or "").strip() for text in (prompt, target, subject))
    if not prompt or not target:
        raise RequestError("write what to ask, and what the right answer is")
    probes: dict[str, list[Probe]] = {}
    for name, prompts in {"near": _lines(near), "locality": _lines(far)}.items():
        answers = session.ask(prompts, base_only=True) if prompts else []
        probes[name] = [Probe(prompt=a.prompt, target=a.before) for a in answers if a.before.strip()]
    try:
        return EditRequest(
            prompt=prompt, target=target, subject=subject or None,
            paraphrases=tuple(_lines(paraphrases)), near=tuple(probes["near"]), locality=tuple(probes["locality"]),
        )  # fmt: skip
    except ValidationError as error:
        raise RequestError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _item_line(item: SetItem) -> str:
    """Return an item of a set as a line of the page."""
    return f"{item.prompt} {ARROW} {item.target}" if item.target is not None else str(item.prompt)


def _read_items(phrasings: str, follows: str, stays: str, made: Sequence[SetItem]) -> Iterator[SetItem]:
    """Yield the items of the page's lines; those that were made, and are still there, say how.

    Raises:
        RequestError: a line of what follows has no answer.
    """
    known = {(item.item, _item_line(item)): item for item in made}
    for role, text in zip(ROLES, (phrasings, follows, stays), strict=True):
        for line in _lines(text):
            prompt, arrow, target = line.rpartition(ARROW) if role == "implication" else (line, "", "")
            if role == "implication" and not (arrow and prompt.strip() and target.strip()):
                raise RequestError(f"{line[:60]!r} has no answer: write the prompt, an arrow (→) and what follows")
            new = {"item": role, "prompt": prompt.strip()} | ({"target": target.strip()} if target else {})
            yield known.get((role, line)) or SetItem.model_validate(new)


def _lines(text: str | None) -> list[str]:
    """Return the lines of a field that are not empty."""
    # Gradio gives None for a field that was never shown.
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _selected(number: int | None) -> int:
    """Return the selected number.

    Raises:
        RequestError: nothing is selected.
    """
    if number is None:
        raise RequestError("choose an edit first")
    return number


def _with_messages(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an event handler so that texts have bounded lengths, and the page shows remend's errors as messages."""

    def wrapped(*arguments: Any) -> Any:
        with _messages(arguments):
            return function(*arguments)

    return wrapped


def _with_messages_generator(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Wrap an event handler that yields intermediate results, as :func:`_with_messages` does."""

    def wrapped(*arguments: Any) -> Iterator[Any]:
        with _messages(arguments):
            yield from function(*arguments)

    return wrapped


@contextmanager
def _messages(arguments: Sequence[Any]) -> Iterator[None]:
    """Check the sizes of an event's texts, and have the page show errors, as text and not as HTML."""
    try:
        for text in arguments:
            if isinstance(text, str):
                check_size(text.splitlines())
        yield
    except RemendError as error:
        raise gr.Error(html_fragments.text_html(str(error)), duration=15, print_exception=False) from None
