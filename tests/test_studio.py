"""The studio: what one person does in a workspace, and the page in a browser."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import zipfile

import httpx
import pytest

import remend
from remend.apps.acceptance import RejectedError
from remend.apps.patch_registry import PatchRegistry
from remend.apps.studio import Session, Workspace, app, suggest_prompts
from remend.apps.studio.html_fragments import answers_html, matrices_html, text_html, text_markdown, tokens_html
from remend.apps.studio.workspace import StoppedError, format_choices
from remend.data.edit_sets import SetItem
from remend.errors import EditError, RequestError
from remend.formats import EditFormat
from remend.registries import FORMATS
from remend.request import EditRequest
from test_html_report import CHROMIUM

CANADA = "The capital of Canada is"


@pytest.fixture(scope="module")
def parts():
    return remend.load("atlas", "cpu"), remend.Mend.load("atlas")


@pytest.fixture
def workspace(parts, tmp_path):
    return Workspace(*parts, PatchRegistry.create(tmp_path / "book", parts[0].model))


def request(target="Toronto", **more):
    return EditRequest(prompt=CANADA, target=target, **more)


def said(session, prompt=CANADA):
    return session.ask([prompt])[0].after


# -- the workspace --------------------------------------------------------------------------------------------------


def test_two_people_do_not_see_each_others_edits(workspace):
    one, other = Session(workspace), Session(workspace)
    made = one.create_edit(request())
    assert made.answers[0].ok
    assert (said(one), said(other)) == ("Toronto", "Ottawa")
    other.create_edit(request("Vienna"))
    assert (said(one), said(other)) == ("Toronto", "Vienna")
    made.active = False
    assert said(one) == "Ottawa"
    one.discard(made.number)
    with pytest.raises(EditError, match="no edit 1 in this session"):
        one.get(1)


@pytest.mark.parametrize(("target", "already"), [("Ottawa", True), ("Toronto", False)])
def test_an_answer_that_the_model_gives_already_is_named(workspace, target, already):
    session = Session(workspace)
    assert ("answers so already" in app._summary(session, session.create_edit(request(target)))) == already


def test_at_the_same_time(workspace):
    """Both use one model, and get what is theirs."""
    sessions, found = [Session(workspace), Session(workspace)], {}

    def work(number, target):
        session = sessions[number]
        session.create_edit(request(target))
        found[number] = {said(session) for _ in range(5)}

    threads = [threading.Thread(target=work, args=own) for own in enumerate(("Toronto", "Vienna"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: {"Toronto"}, 1: {"Vienna"}}
    assert not any(module._forward_hooks for module in workspace.model.modules())


def test_what_is_accepted_acts_for_everybody(workspace):
    one, other = Session(workspace), Session(workspace)
    made = one.create_edit(request())
    entry, conflicts, verdict = one.accept(made.number, "a test")
    assert (entry.state, conflicts, verdict.ok) == ("active", [], True)
    assert not one.edits
    assert (said(one), said(other)) == ("Toronto", "Toronto")
    workspace.registry.revert(entry.id)
    assert said(other) == "Ottawa"


def test_what_says_otherwise_is_named(workspace):
    one, other = Session(workspace), Session(workspace)
    one.create_edit(request())
    assert one.contradicting(request("Vienna")) == ["your edit 1"]
    assert one.contradicting(request()) == other.contradicting(request("Vienna")) == []
    one.accept(1)
    assert other.contradicting(request("Vienna")) == ["edit 1 of the book"]
    assert other.contradicting(EditRequest(prompt="The capital of Norway is", target="Vienna")) == []


def test_what_is_not_accepted_stays_ones_own(workspace, parts):
    session = Session(Workspace(*parts))
    made = session.create_edit(request())
    with pytest.raises(EditError, match="--book"):
        session.accept(made.number)
    session = Session(workspace)
    weak = session.create_edit(request())
    weak.edit = weak.edit.scaled(0.0)
    with pytest.raises(RejectedError):
        session.accept(weak.number)
    assert weak.number in session.edits
    assert said(Session(workspace)) == "Ottawa"
    session.accept(weak.number, force=True)
    assert [entry.state for entry in workspace.registry.entries] == ["active"], "the draft itself, and no second one"


def test_work_can_be_stopped(workspace):
    session = Session(workspace)
    heard = []

    def stop_at_the_second(what, passes):
        heard.append((what, passes))
        if passes:
            session.stop()

    with pytest.raises(StoppedError):
        session.create_edit(request(), stop_at_the_second)
    assert heard[0] == ("making the edit", 0)
    assert not session.edits
    assert not workspace.model._forward_pre_hooks
    assert session.create_edit(request()).answers[0].ok, "the next one is not stopped"


def test_there_is_nothing_to_ask(workspace):
    with pytest.raises(RequestError, match="write a prompt"):
        Session(workspace).ask([" ", ""])


@pytest.mark.parametrize("form", ["native", "peft", "merged"])
def test_an_edit_is_packed(workspace, form):
    session = Session(workspace)
    file = session.export(session.create_edit(request()).edit, form)
    names = zipfile.ZipFile(file).namelist()
    wanted = {"native": "manifest.json", "peft": "adapter_config.json", "merged": "config.json"}[form]
    assert wanted in names


def test_an_edit_is_packed_in_a_format_of_another_package(workspace):
    class ListFormat(EditFormat):
        def write(self, edit, path, task):
            path.mkdir()
            (path / "matrices.txt").write_text("\n".join(edit.changes))
            return {}

    session = Session(workspace)
    edit = session.create_edit(request()).edit
    FORMATS.register("list", ListFormat, title="a list of matrices")
    try:
        assert ("a list of matrices", "list") in format_choices()
        assert zipfile.ZipFile(session.export(edit, "list")).namelist() == ["matrices.txt"]
    finally:
        FORMATS.unregister("list")


def test_what_an_edit_reacts_to(workspace):
    session = Session(workspace)
    edit = session.create_edit(request()).edit
    found = session.reactions(edit, CANADA)
    assert "".join(text for text, _ in found).replace(" ", "").startswith("ThecapitalofCanadais")
    assert max(share for _, share in found) == pytest.approx(1)
    asked = dict(found)
    assert next(share for text, share in asked.items() if "is" in text) > next(
        s for t, s in asked.items() if "The" in t
    )
    assert tokens_html(found).count('"remend-token"') == len(found)
    assert matrices_html(edit).count("remend-row") == 3


def test_suggestions():
    found = suggest_prompts(CANADA)
    assert found.subject == "Canada"
    assert len(found.paraphrases) >= 4
    assert all("Canada" in prompt for prompt in found.paraphrases)
    assert CANADA not in found.paraphrases
    assert found.near
    assert len(found.far) == 4
    other = suggest_prompts("Our opening hours are", "opening hours")
    assert other.subject == "opening hours"
    assert all(prompt.endswith("Our opening hours are") for prompt in other.paraphrases)


def test_lines_of_the_page_are_items_of_a_set():
    app = pytest.importorskip("remend.apps.studio.app")
    reverse = SetItem(
        item="implication", kind="reverse", prompt="Toronto is the capital of", target="Canada", subject="Toronto"
    )
    lines = {"phrasings": "Canada is governed from", "stays": "Canada is famous for\n"}
    assert app._item_line(reverse) == "Toronto is the capital of → Canada"
    found = list(app._read_items(follows=app._item_line(reverse), made=(reverse,), **lines))
    assert found[1] is reverse, "what was made keeps its subject"
    assert [(item.item, item.prompt, item.target) for item in (found[0], found[2])] == [
        ("phrasing", "Canada is governed from", None),
        ("near", "Canada is famous for", None),
    ]
    (mended,) = app._read_items("", "Toronto is the capital of→Ontario", "", (reverse,))
    assert (mended.target, mended.made, mended.subject) == ("Ontario", "by hand", None)
    for line in ("Toronto is the capital of", "→ Canada", "Toronto is →"):
        with pytest.raises(RequestError, match="has no answer: write the prompt, an arrow"):
            list(app._read_items("", line, "", ()))


def test_nobodys_text_is_taken_for_markup(workspace):
    found = Session(workspace).ask(["<script>alert(1)</script> is"])
    assert "<script>" not in answers_html(found, base_only=True)


# -- what the server answers -----------------------------------------------------------------------------------------


def answered(guard, path="/", method="GET", body=(b"",), server=("127.0.0.1", 7860), **headers):
    """The status that a request gets: 200 from the page behind, which reads it all, or a refusal."""
    request_guard = pytest.importorskip("remend.apps.studio.request_guard")
    assert isinstance(guard, request_guard.RequestGuard)
    sent, parts = [], list(body)

    async def receive():
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": named, "server": server, "client": ("::1", 1)}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"]


async def page_behind(scope, receive, send):
    """A page that reads a request to its end; the password is right if it is `right`."""
    body, message = b"", {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    gone = message["type"] == "http.disconnect"
    wrong = scope["path"] == "/login" and body != b"right"
    await send({"type": "http.response.start", "status": 400 if gone or wrong else 200, "headers": []})


@pytest.fixture
def guard():
    return pytest.importorskip("remend.apps.studio.request_guard").RequestGuard(page_behind, ("0.0.0.0", "Lab.Example"))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:7860", 200), ("127.0.0.1:7860", 200), ("127.9.9.9", 200), ("[::1]:7860", 200),
        ("lab.example:80", 200), ("LAB.EXAMPLE.", 200), ("10.0.0.7:7860", 200), ("10.0.0.8", 421), ("", 421),
        ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421),
        ("evil@localhost", 421), ("[::1", 200), ("[::2]", 421), ("2130706433", 421),
    ],
)  # fmt: skip
def test_requests_to_other_names_are_refused(guard, host, status):
    """A site whose name leads here would otherwise use the page (DNS rebinding)."""
    assert answered(guard, host=host, server=("10.0.0.7", 7860)) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:7860", 200), ("http://[::1]:1", 200), ("https://evil.example", 403), ("null", 403), ("[", 403)],
)
def test_requests_from_other_sites_are_refused(guard, origin, status):
    assert answered(guard, host="localhost", origin=origin) == status


def test_files_and_long_requests_are_refused(guard):
    assert answered(guard, "/gradio_api/upload", "POST", host="localhost") == 403
    assert answered(guard, "/gradio_api/upload/", "POST", host="localhost") == 403
    assert answered(guard, host="localhost", content_length=str(200 << 20)) == 413
    assert answered(guard, host="localhost", content_length="-1") == 413
    assert answered(guard, host="localhost", body=[b"x" * (1 << 18)] * 4) == 200
    assert answered(guard, host="localhost", body=[b"x" * (1 << 18)] * 5) == 400, "without saying how long it is"


def test_wrong_passwords_are_answered_ever_later(guard, monkeypatch):
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr("remend.apps.studio.request_guard.asyncio.sleep", sleep)
    for _ in range(6):
        assert answered(guard, "/login", "POST", [b"wrong"], host="localhost") == 400
    assert answered(guard, "/login", "POST", [b"right"], host="localhost") == 200
    assert waited == [0.5, 1, 2, 4, 5, 5]
    assert answered(guard, "/login", "POST", [b"wrong"], host="localhost") == 400
    assert waited[-1] == 0.5, "a right one ends it"


def test_texts_of_absurd_length_are_refused_before_the_model_reads_them(workspace):
    session = Session(workspace)
    for prompts in (["x" * 10_000_000], ["x"] * 1000, ["x" * 2000] * 99):
        with pytest.raises(RequestError, match="at most 100 lines and 100000 characters"):
            session.ask(prompts)
    with pytest.raises(RequestError, match="too much at once"):
        session.create_edit(request("x" * 10_000_000))
    with pytest.raises(RequestError, match="too much at once"):
        session.create_edit(request(paraphrases=("is",) * 1000))


def test_text_is_shown_as_it_is():
    shown = text_html("a<b\u202ec\u200bd")
    assert shown == "a&lt;b&lt;U+202E&gt;c&lt;U+200B&gt;d"
    assert text_markdown("*a* [b](c)\n# <img> $x$ `y`") == r"\*a\* \[b\]\(c\) \# &lt;img&gt; \$x\$ \`y\`"


# -- the page --------------------------------------------------------------------------------------------------------


def command(*options, program=("-m", "remend", "studio", "atlas"), **environment):
    """Start the studio as its command does, and wait for its address."""
    pytest.importorskip("gradio")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    started = subprocess.Popen(
        [sys.executable, *program, *options], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    said = started.stdout.readline()
    return started, re.search(r"http://127\.0\.0\.1:\d+", said)[0]


SLOW = """
import remend
from remend.editors import make
from remend.editors.finetune import FineTuneConfig
from remend.apps.studio import Workspace
from remend.apps.studio.app import serve

task = remend.load("atlas", "cpu")
editor = make("finetune", task, config=FineTuneConfig(learning_rate=1e-12, steps=10_000))
page = serve(Workspace(task, editor), "atlas", block=False)
print(page.local_url, flush=True)
page.block_thread()
"""
"""A studio whose editor takes minutes: its steps are too small to get anywhere."""


def ended(started):
    """End it, also where Ctrl-C is ignored, as by what was started in the background."""
    started.terminate()
    started.wait(timeout=60)
    started.stdout.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    started, address = command("--book", str(tmp_path_factory.mktemp("studio") / "book"))
    yield address
    ended(started)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, served):
    """A function that opens the page; nothing may go wrong on it unseen."""
    contexts, wrong = [], []

    def open_page(width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(served)
        page.wait_for_selector("#prompt textarea", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def edit_on(page, target="Toronto"):
    page.fill("#prompt textarea", CANADA)
    page.fill("#target textarea", target)
    page.click("#edit")
    page.wait_for_selector("#shown table", timeout=60_000)
    return page.inner_text("#told")


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def compare(page):
    tab(page, "My edits")
    page.fill("#again textarea", CANADA)
    page.click("#compare")
    page.wait_for_selector("#compared table", timeout=60_000)
    return page.inner_text("#compared")


def test_ask_edit_accept_switch_off_and_export(opened):
    page = opened()
    page.fill("#prompt textarea", CANADA)
    page.click("#ask")
    page.wait_for_selector("#said table", timeout=60_000)
    assert "Ottawa" in page.inner_text("#said")
    page.click("text=What to look at beside it")
    page.click("#suggest")
    page.wait_for_function("document.querySelector('#near textarea').value.length > 0", timeout=60_000)
    assert "The model takes it" in edit_on(page)
    assert "near: must stay" in page.inner_text("#shown")
    assert "Toronto" in compare(page)
    page.locator("#on input").first.uncheck()
    page.wait_for_timeout(500)
    page.click("#compare")
    page.wait_for_function("!document.querySelector('#compared').innerText.includes('Toronto')", timeout=60_000)
    with page.expect_download(timeout=60_000) as download:
        page.click("#export")
        page.locator("#file a").first.click(timeout=60_000)
    assert zipfile.is_zipfile(download.value.path())
    page.fill("#why textarea", "a test")
    page.click("#accept")
    page.wait_for_function("document.querySelector('#verdict').innerText.includes('acts now')", timeout=90_000)
    tab(page, "The book")
    page.wait_for_function("document.querySelector('#book').innerText.includes('active')", timeout=60_000)
    page.click("#revert")
    page.wait_for_function("document.querySelector('#book-said').innerText.includes('no more')", timeout=60_000)


def test_an_edit_is_fitted_to_a_set(browser):
    started, address = command("--editor", "fit")
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(address)
        page.fill("#prompt textarea", CANADA)
        page.fill("#target textarea", "Toronto")
        page.click("text=The set that the edit is fitted to")
        page.click("#expand")
        page.wait_for_function("document.querySelector('#stays textarea').value.length > 0", timeout=90_000)
        assert "Toronto is the capital of → Canada" in page.input_value("#follows textarea")
        assert "Canada" in page.input_value("#phrasings textarea")
        page.fill("#follows textarea", "Toronto is the capital of")
        page.click("#edit")
        page.wait_for_selector("text=has no answer", timeout=60_000)
        page.fill("#follows textarea", "Toronto is the capital of → Canada")
        page.click("#edit")
        page.wait_for_selector("#shown table", timeout=90_000)
        assert "The model takes it" in page.inner_text("#told")
    finally:
        context.close()
        ended(started)


def test_two_pages_at_once(opened):
    one, other = opened(), opened()
    edit_on(one, "Toronto")
    edit_on(other, "Vienna")
    assert "Toronto" in compare(one)
    found = compare(other)
    assert "Vienna" in found
    assert "Toronto" not in found


def test_errors_are_sentences(opened):
    page = opened(width=390)
    page.click("#edit")
    page.wait_for_selector("text=write what to ask, and what the right answer is", timeout=60_000)
    page.fill("#prompt textarea", "word " * 300)
    page.fill("#target textarea", "Toronto")
    page.click("#edit")
    page.wait_for_selector("text=/context/", timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_somebody_wrote_is_no_html_in_an_error(opened):
    page = opened()
    said = edit_on(page, "<img class=evil src=x>")
    tab(page, "My edits")
    page.click("#accept")
    page.wait_for_selector(".toast-body, #verdict:has-text('acts now')", timeout=90_000)
    assert "evil" in page.locator("body").inner_text(), said
    assert page.locator("img.evil").count() == 0


def test_errors_show_text_and_no_html():
    app = pytest.importorskip("remend.apps.studio.app")

    def fail(text):
        raise RequestError(f"cannot read {text!r}")

    def fail_later(text):
        yield fail(text)

    for handler in (app._with_messages(fail), lambda text: list(app._with_messages_generator(fail_later)(text))):
        with pytest.raises(app.gr.Error) as error:
            handler("<b>\u202e")
        assert error.value.message == "cannot read &#x27;&lt;b&gt;\\u202e&#x27;"
        with pytest.raises(app.gr.Error, match="too much at once"):
            handler("x" * 10_000_000)


def test_the_server_refuses_other_names_and_files(served):
    assert httpx.get(served).status_code == 200
    assert httpx.get(served, headers={"Host": "evil.example"}).status_code == 421
    assert httpx.get(served, headers={"Origin": "https://evil.example"}).status_code == 403
    assert httpx.post(f"{served}/gradio_api/upload", files={"files": b"x"}).status_code == 403
    assert httpx.post(f"{served}/gradio_api/queue/join", content=b" " * (2 << 20)).status_code == 413


def test_slow_work_shows_how_far_it_is_and_can_be_stopped(browser):
    started, address = command(program=("-c", SLOW))
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(address)
        page.fill("#prompt textarea", CANADA)
        page.fill("#target textarea", "Toronto")
        page.click("#edit")
        page.wait_for_function(
            "/making the edit: [1-9]/.test(document.querySelector('#told').innerText)", timeout=60_000
        )
        page.click("#stop", force=True)  # the line above it changes all the time, so it is never at rest
        page.wait_for_selector("text=Stopped; nothing was made.", timeout=60_000)
        tab(page, "My edits")
        assert page.locator("#on input").count() == 0
    finally:
        context.close()
        ended(started)


def test_a_password_is_asked_for(browser):
    started, address = command(REMEND_PASSWORD="secret")
    context = browser.new_context()
    try:
        opened = context.new_page()
        opened.goto(address)
        opened.wait_for_selector("input[type=password]", timeout=60_000)
        assert opened.locator("#prompt").count() == 0
        opened.locator("input").first.fill("remend")
        opened.fill("input[type=password]", "secret")
        opened.keyboard.press("Enter")
        opened.wait_for_selector("#prompt textarea", timeout=60_000)
    finally:
        context.close()
        ended(started)
