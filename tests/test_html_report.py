"""The HTML report, in a browser: Chromium, driven by Playwright (skipped where there is none)."""

import json
import shutil

import pytest

from remend.evaluation.before_after import AnswerComparison
from remend.evaluation.reports.html_report import _embed, write_html_report
from remend.evaluation.reports.report import Case, Report, Run
from remend.evaluation.summary import Summary

pytest.importorskip("matplotlib")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CELLS = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"


def case(number, success, near, answer="Rome"):
    values = {
        "reliability": {"teacher_forced": 1.0, "generated": success},
        "edit_success": {"teacher_forced": 1.0, "generated": success},
        "locality_near": {"teacher_forced": near, "generated": near},
        "kl_near": {"value": 1 - near},
    }
    about = {"relation": f"P{number % 3}", "target_tokens": 1 + number % 2, "confidence": number / 100}
    prompt = f"The capital of country {number} is"
    answers = (
        AnswerComparison("prompt", prompt, "Rome", "Oslo", answer, answer == "Rome"),
        AnswerComparison("near", "A </script><b>bold</b> prompt", "Bern", "Bern", "Bern", True),
        AnswerComparison("adversarial", f"{prompt} Rome. " * 20, "Bern", "Bern", "Bern", True),
    )
    return Case(f"case {number}", prompt, "Rome", "Oslo", values, about, answers)


def report(protocol="single"):
    cases = [case(n, float(n % 5 > 0), n % 4 / 4, "Rome" if n % 5 else "Oslo") for n in range(60)]
    kept = {} if protocol == "single" else {"in_context": Summary(0.75, (0.5, 1.0), 40)}
    runs = [Run(count, cases[:count], 0.01, kept) for count in ((60,) if protocol == "single" else (1, 10, 60))]
    return Report(
        "tiny", "some.jsonl", runs, {"torch": "2"}, "mend", protocol,
        baselines={name: [case(n, 0.0, 1.0) for n in range(60)] for name in ("unedited", "in_context")},
        frontier=dict.fromkeys((0.5, 1.0, 2.0), cases) if protocol == "single" else {},
        left_out={"requests": 3},
    )  # fmt: skip


@pytest.mark.parametrize("protocol", ["single", "sequential"])
def test_the_page_holds_plots_and_every_edit(tmp_path, protocol):
    write_html_report(report(protocol), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    pictures = {"single": "frontier", "sequential": "retention"}
    assert f'id="picture-{pictures[protocol]}"' in text
    embedded = text[text.index('id="cases">') + len('id="cases">') :]
    cases = json.loads(embedded[: embedded.index("</script>")])
    assert len(cases) == 60
    pair, stays = cases[0]["groups"]
    assert (pair["title"], pair["right"], pair["judged"]) == ("the pair", 0, 1)
    assert (stays["title"], stays["right"], stays["judged"], stays["done"]) == ("what should stay", 2, 2, "stayed")
    assert stays["answers"][0][1] == "A </script><b>bold</b> prompt"
    assert "3 requests" in text
    assert ("<th>in context (40)</th>" in text and 'id="picture-abilities"' in text) is (protocol == "sequential")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_sorts_filters_and_expands_in_a_browser(browser, tmp_path, width):
    write_html_report(report(), tmp_path / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: complaints.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    page.goto(f"file://{tmp_path}/report.html")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"

    def column(number):
        return [cells[number] for cells in page.eval_on_selector_all("#edits tr.row", CELLS)]

    assert page.inner_text("#count") == "50 of 60 edits"
    assert column(3)[0] == "0.00", "failures come first"
    page.click("#next")
    assert page.inner_text("#count") == "60 of 60 edits"
    for _ in range(2):
        page.click("#edits th:nth-child(5) button")
    near = [float(text) for text in column(4)]
    assert near == sorted(near, reverse=True)
    assert page.get_attribute("#edits th:nth-child(5)", "aria-sort") == "descending"
    page.fill("#search", "country 17")
    assert column(0) == ["The capital of country 17 is"]
    page.click("#edits tr.row")
    shown = page.inner_text("#edits tr.more")
    assert "A </script><b>bold</b> prompt" in shown
    assert "✓" in shown
    too_wide = "[...document.querySelectorAll('#edits td')].filter(td => td.scrollWidth > td.clientWidth).length"
    assert page.evaluate(too_wide) == 0, "no text runs over the next cell"
    page.fill("#search", "")
    page.select_option("#show", "failed")
    assert page.inner_text("#count") == "12 of 12 edits"
    page.fill("#search", "nothing like that")
    assert page.inner_text("#count") == "0 of 0 edits"
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in asked), "nothing is fetched from elsewhere"
    page.close()


def test_invisible_characters_are_marked_on_the_page():
    assert _embed(["a\u202eb"]) == r'["a\u003cU+202E\u003eb"]'
