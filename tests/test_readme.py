"""The README's commands and code, run as they stand (with less time to train)."""

import re
import shlex
from pathlib import Path

import pytest

import worlds
from remend.apps.acceptance import AcceptanceCriteria
from remend.cli import run
from remend.request import Chat, parse_request, write_requests

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language, text=TEXT):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what the README calls my-model, requests.jsonl and held-out.jsonl."""
    monkeypatch.chdir(tmp_path)
    worlds.gpt2().save_pretrained("my-model")
    worlds.tokenizer().save_pretrained("my-model")
    requests = worlds.requests(40)
    write_requests("requests.jsonl", [r for r in requests if r.subject not in worlds.COUNTRIES[:3]])
    write_requests("held-out.jsonl", [r for r in requests if r.subject in worlds.COUNTRIES[:3]])
    return tmp_path


WRITTEN = r"--(?:out|json|html) (\S+)"
SHORTER = {"--budget-seconds 600": "--max-steps 10", "--limit 20": "--limit 4"}


def commands(chapter):
    """The commands of a chapter that can be run here."""
    lines = []
    for block in blocks("bash", chapter):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["remend"]:
                lines.append(line)
            else:
                assert words[:1] in (["make"], ["pip"], []), line
    return lines


CHAPTERS = {chapter.splitlines()[0]: lines for chapter in TEXT.split("\n## ") if (lines := commands(chapter))}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_commands(desk, chapter):
    for line in CHAPTERS[chapter]:
        for part, shorter in SHORTER.items():
            line = line.replace(part, shorter)
        words = shlex.split(line, comments=True)
        # The stand-in for the reader's own model is random and trained for ten steps: its edits need not take.
        allowed = (0, 1) if words[1] == "edit" and "./my-model" in words else (0,)
        ended = run(words[1:])
        assert ended in allowed, line
        for name in re.findall(WRITTEN, line):
            assert ended == 1 or (desk / name).exists(), line


def test_the_chapters_with_commands():
    assert sum(map(len, CHAPTERS.values())) >= 18
    written = {chapter: re.findall(WRITTEN, " ".join(lines)) for chapter, lines in CHAPTERS.items()}
    assert "my-edit" in written["Fix an answer"]
    assert "report.json" in written["Your own model"]
    assert "mend.json" in written["How good it is"]


def test_the_code(desk):
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    assert (desk / "my-edit" / "manifest.json").is_file()


def test_the_example_requests():
    for line in blocks("json"):
        if "must_change" in line:
            assert AcceptanceCriteria.model_validate_json(line).must_stay
            continue
        request = parse_request(line, "README.md")
        assert {type(prompt) for prompt in request.paraphrases} == {type(request.prompt)}
    assert isinstance(request.prompt, Chat), "the last one is a conversation"
