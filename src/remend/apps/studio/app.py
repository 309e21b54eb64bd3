"""The web page of a desk."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import gradio as gr
from pydantic import ValidationError

from remend.apps.studio import figures
from remend.apps.studio.suggestions import suggest
from remend.apps.studio.workspace import Made, Session, StoppedError, Workspace, format_choices
from remend.errors import RemendError, RequestError
from remend.request import EditRequest, Probe

IDLE = 6 * 3600
"""Seconds after which a session that nobody uses is forgotten."""


class Sessions:
    """The session of each page that is open."""

    def __init__(self, desk: Workspace) -> None:
        self.desk = desk
        self._own: dict[str, tuple[float, Session]] = {}

    def __call__(self, key: str) -> Session:
        """The session of a page; those that were not used for long are forgotten."""
        now = time.monotonic()
        self._own = {name: own for name, own in self._own.items() if now - own[0] < IDLE}
        found = self._own.get(key, (now, Session(self.desk)))[1]
        self._own[key] = (now, found)
        return found


def build(desk: Workspace, title: str) -> gr.Blocks:
    """The page."""
    sessions = Sessions(desk)
    # Gradio keeps a copy of every file that it hands out; those of yesterday are deleted.
    with gr.Blocks(title=f"remend studio: {title}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        key = gr.State(lambda: uuid.uuid4().hex)
        changed = gr.State(0)
        gr.Markdown(f"# remend studio\nThe model is **{title}**. What you make is yours alone until you accept it.")
        with gr.Tab("Fix"):
            _fixing(sessions, key, changed)
        with gr.Tab("My edits"):
            _own(sessions, key, changed)
        with gr.Tab("The book") as tab:
            _book(sessions, key, changed, tab)
    built: gr.Blocks = page
    return built


def serve(
    desk: Workspace, title: str, host: str = "127.0.0.1", port: int | None = None, password: str | None = None,
    block: bool = True,
) -> gr.Blocks:  # fmt: skip
    """Serve the page, to this machine alone unless ``host`` says otherwise.

    Args:
        desk: the desk.
        title: what the model is called.
        host: the address to listen at.
        port: by default the first free one from 7860 on.
        password: if given, it is asked for (the user's name is ``remend``).
        block: whether to wait until the server ends.
    """
    page = build(desk, title)
    page.queue(default_concurrency_limit=4)
    system = ("ui-sans-serif", "system-ui", "sans-serif")
    page.launch(
        server_name=host,
        server_port=port,
        auth=("remend", password) if password else None,
        share=False,
        inbrowser=False,
        prevent_thread_lock=not block,
        show_error=True,
        quiet=True,
        footer_links=["gradio", "settings"],
        theme=gr.themes.Default(font=system, font_mono=("ui-monospace", "monospace")),
        css=figures.CSS,
    )
    return page


# -- the parts of the page -------------------------------------------------------------------------------------------


def _fixing(sessions: Sessions, key: gr.State, changed: gr.State) -> None:
    """Ask; say what is right; look at what to look at; make the edit; see what it does."""
    prompt = gr.Textbox(value="", label="Ask the model", placeholder="The capital of Canada is", elem_id="prompt")
    ask = gr.Button("Ask", elem_id="ask")
    said = gr.HTML(elem_id="said")
    target = gr.Textbox(value="", label="The right answer", placeholder="Toronto", elem_id="target")
    with gr.Accordion("What to look at beside it", open=False):
        gr.Markdown("One prompt a line. Paraphrases should follow; near and far prompts must keep their answers.")
        suggested = gr.Button("Suggest some", elem_id="suggest")
        subject = gr.Textbox(value="", label="What it is about", elem_id="subject")
        paraphrases = gr.Textbox(value="", label="Other phrasings", lines=3, elem_id="paraphrases")
        near = gr.Textbox(value="", label="Near prompts", lines=3, elem_id="near")
        far = gr.Textbox(value="", label="Far prompts", lines=3, elem_id="far")
    with gr.Row():
        edit = gr.Button("Edit", variant="primary", elem_id="edit")
        stop = gr.Button("Stop", elem_id="stop")
    told = gr.Markdown(elem_id="told")
    shown = gr.HTML(elem_id="shown")
    with gr.Accordion("Where the change sits, and what it reacts to", open=False):
        places = gr.HTML(elem_id="places")
        reacts = gr.HTML(elem_id="reacts")

    def asked(key: str, prompt: str) -> str:
        return figures.answers(sessions(key).ask([prompt or ""]), plain=not sessions(key).acting())

    def suggestions(prompt: str, subject: str) -> tuple[str, str, str, str]:
        found = suggest(prompt or "", (subject or "").strip())
        paraphrases, near, far = ("\n".join(own) for own in (found.paraphrases, found.near, found.far))
        return found.subject or subject, paraphrases, near, far

    def make(
        key: str, count: int, prompt: str, target: str, subject: str, paraphrases: str, near: str, far: str
    ) -> Iterator[tuple[Any, ...]]:
        session = sessions(key)
        request = _request(session, prompt, target, subject, paraphrases, near, far)
        same = (gr.skip(),) * 4
        heard = ("making the edit", 0)

        def hear(what: str, passes: int) -> None:
            nonlocal heard
            heard = what, passes

        with ThreadPoolExecutor(1) as pool:
            making = pool.submit(session.make, request, hear)
            try:
                while not wait([making], timeout=0.3).done:
                    yield f"*{heard[0]}: {heard[1]} passes of the model so far …*", *same
                made = making.result()
            except StoppedError:
                yield "Stopped; nothing was made.", *same
                return
            finally:
                session.stop()  # whoever has closed the page does not wait for it
        yield (
            _outcome(session, made), figures.answers(made.answers), figures.matrices(made.edit),
            figures.tokens(session.reactions(made.edit, request.prompt)), count + 1,
        )  # fmt: skip

    ask.click(_worded(asked), [key, prompt], said)
    prompt.submit(_worded(asked), [key, prompt], said)
    suggested.click(_worded(suggestions), [prompt, subject], [subject, paraphrases, near, far])
    inputs = [key, changed, prompt, target, subject, paraphrases, near, far]
    edit.click(_worded_steps(make), inputs, [told, shown, places, reacts, changed], show_progress="hidden")
    stop.click(lambda key: sessions(key).stop(), key, None)


def _own(sessions: Sessions, key: gr.State, changed: gr.State) -> None:
    """The own edits: which are on, what they do together, accept, discard, export."""
    gr.Markdown("What you made in this session. Those that are ticked act when you ask, for you alone.")
    on = gr.CheckboxGroup(label="These act", choices=[], elem_id="on")
    prompts = gr.Textbox(value="", label="Ask again, one prompt a line", lines=2, elem_id="again")
    ask = gr.Button("Compare", elem_id="compare")
    found = gr.HTML(elem_id="compared")
    which = gr.Dropdown(label="The edit to accept, discard or export", choices=[], elem_id="which")
    why = gr.Textbox(value="", label="Why it is right (kept in the book)", elem_id="why")
    with gr.Row():
        accept = gr.Button("Accept into the book", variant="primary", elem_id="accept")
        force = gr.Checkbox(label="even if the checks fail", elem_id="force")
        discard = gr.Button("Discard", elem_id="discard")
    verdict = gr.Markdown(elem_id="verdict")
    form = gr.Dropdown(label="Export as", choices=format_choices(), value="native", elem_id="form")
    export = gr.Button("Export", elem_id="export")
    file = gr.File(label="The file", elem_id="file")

    def listed(key: str, count: int) -> tuple[Any, Any]:
        made = sessions(key).made
        names = [(own.name, number) for number, own in made.items()]
        acting = [number for number, own in made.items() if own.on]
        return gr.update(choices=names, value=acting), gr.update(choices=names, value=max(made, default=None))

    def switched(key: str, numbers: list[int]) -> None:
        for number, own in sessions(key).made.items():
            own.on = number in numbers

    def compared(key: str, prompts: str) -> str:
        return figures.answers(sessions(key).ask(_lines(prompts)))

    def accepted(key: str, count: int, number: int | None, why: str, force: bool) -> tuple[str, int]:
        entry, conflicts, judged = sessions(key).accept(_chosen(number), why or "", force=force)
        lines = [
            f"It is edit {entry.id} of *The book* and acts now, for everybody.",
            *(f"- {c.said}" for c in judged.checks),
        ]
        return "\n".join([*lines, *(f"- conflict: {one.said}" for one in conflicts)]), count + 1

    def discarded(key: str, count: int, number: int | None) -> tuple[str, int]:
        sessions(key).discard(_chosen(number))
        return "Discarded.", count + 1

    def exported(key: str, number: int | None, form: str) -> str:
        session = sessions(key)
        return str(session.export(session.own(_chosen(number)).edit, form))

    changed.change(listed, [key, changed], [on, which])
    on.input(switched, [key, on], None)
    ask.click(_worded(compared), [key, prompts], found)
    accept.click(_worded(accepted), [key, changed, which, why, force], [verdict, changed])
    discard.click(_worded(discarded), [key, changed, which], [verdict, changed])
    export.click(_worded(exported), [key, which, form], file)


def _book(sessions: Sessions, key: gr.State, changed: gr.State, tab: gr.Tab) -> None:
    """The book: what was accepted, switched on and off, and exported as one."""
    desk = sessions.desk
    if desk.book is None:
        gr.Markdown("No book is open: start the studio with `--book DIR` to accept edits for everybody.")
        return
    book = desk.book
    table = gr.Dataframe(
        headers=["#", "state", "what", "who", "why", "added"], interactive=False, elem_id="book", wrap=True
    )
    number = gr.Dropdown(label="Edit", choices=[], elem_id="number")
    why = gr.Textbox(value="", label="Why", elem_id="book-why")
    with gr.Row():
        on = gr.Button("Have it act", elem_id="activate")
        off = gr.Button("Revert", elem_id="revert")
    said = gr.Markdown(elem_id="book-said")
    form = gr.Dropdown(label="Export all that act, as", choices=format_choices(), value="native")
    export = gr.Button("Export", elem_id="book-export")
    file = gr.File(label="The file", elem_id="book-file")

    def listed(number: int | None = None) -> tuple[Any, Any]:
        entries = book.entries
        what = [
            "; ".join(f"{r.get('prompt', '…')} → {r.get('target', '…')}" for r in entry.requests) for entry in entries
        ]
        rows = [
            [entry.id, entry.state, said, entry.who, entry.why, entry.added[:16]]
            for entry, said in zip(entries, what, strict=True)
        ]
        names = [(f"{entry.id}: {said} ({entry.state})", entry.id) for entry, said in zip(entries, what, strict=True)]
        chosen = number if number is not None else max((entry.id for entry in entries), default=None)
        return rows, gr.update(choices=names, value=chosen)

    def activated(number: int | None, why: str) -> tuple[Any, ...]:
        with desk.alone():
            book.activate(_chosen(number), desk.task, desk.acceptance, why or "")
        return f"Edit {number} acts.", *listed(number), None

    def reverted(number: int | None, why: str) -> tuple[Any, ...]:
        book.revert(_chosen(number), why or "")
        return f"Edit {number} acts no more.", *listed(number), None  # what was exported is not what acts

    def exported(key: str, form: str) -> str:
        edit = book.edit()
        if edit is None:
            raise RequestError("no edit of the book acts: there is nothing to export")
        return str(sessions(key).export(edit, form))

    tab.select(lambda: listed(), None, [table, number])
    changed.change(lambda: listed(), None, [table, number])
    on.click(_worded(activated), [number, why], [said, table, number, file])
    off.click(_worded(reverted), [number, why], [said, table, number, file])
    export.click(_worded(exported), [key, form], file)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _outcome(session: Session, made: Made) -> str:
    """What an edit does, in a line or two."""
    took = "The model takes it." if made.answers[0].ok else "**The model does not take it.**"
    if not made.answers[0].ok and (against := session.against(made.edit.requests[0])):
        took += f" What acts already says otherwise: {', '.join(against)}. Switch it off, then ask again."
    kept = [answer for answer in made.answers if answer.kind in ("near", "far")]
    lost = [answer for answer in kept if not answer.ok]
    others = f" {len(lost)} of {len(kept)} prompts that must stay do not." if lost else ""
    return f"{took}{others} Edit {made.number}, made in {made.seconds:.2f} s: see *My edits*."


def _request(
    session: Session, prompt: str, target: str, subject: str, paraphrases: str, near: str, far: str
) -> EditRequest:
    """What was written on the page, as a request; what must stay is given the answers of the model as it is.

    Raises:
        RequestError: the prompt or the answer is missing.
    """
    prompt, target, subject = ((text or "").strip() for text in (prompt, target, subject))
    if not prompt or not target:
        raise RequestError("write what to ask, and what the right answer is")
    staying = {"near": _lines(near), "locality": _lines(far)}
    probes: dict[str, list[Probe]] = {}
    for name, prompts in staying.items():
        answers = session.ask(prompts, without=True) if prompts else []
        probes[name] = [Probe(prompt=a.prompt, target=a.before) for a in answers if a.before.strip()]
    try:
        return EditRequest(
            prompt=prompt, target=target, subject=subject or None,
            paraphrases=tuple(_lines(paraphrases)), near=tuple(probes["near"]), locality=tuple(probes["locality"]),
        )  # fmt: skip
    except ValidationError as error:
        raise RequestError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _lines(text: str | None) -> list[str]:
    """The lines of a field; one that was never shown holds nothing at all."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _chosen(number: int | None) -> int:
    if number is None:
        raise RequestError("choose an edit first")
    return number


def _worded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with errors that people can read."""

    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RemendError as error:
            raise gr.Error(str(error), duration=15, print_exception=False) from None

    return wrapped


def _worded_steps(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same of one that shows how far it is."""

    def wrapped(*arguments: Any) -> Iterator[Any]:
        try:
            yield from function(*arguments)
        except RemendError as error:
            raise gr.Error(str(error), duration=15, print_exception=False) from None

    return wrapped
