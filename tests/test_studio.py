"""The studio: what one person does in a workspace, and the page in a browser."""

import os
import re
import subprocess
import sys
import threading
import zipfile

import pytest

import remend
from remend.apps.acceptance import RejectedError
from remend.apps.patch_registry import PatchRegistry
from remend.apps.studio import Session, Workspace, suggest_prompts
from remend.apps.studio.html_fragments import answers_html, matrices_html, tokens_html
from remend.apps.studio.workspace import StoppedError, format_choices
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


def test_nobodys_text_is_taken_for_markup(workspace):
    found = Session(workspace).ask(["<script>alert(1)</script> is"])
    assert "<script>" not in answers_html(found, base_only=True)


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
        page.click("#stop")
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
