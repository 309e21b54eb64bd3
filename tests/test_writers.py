"""Phrasings that another model writes."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import remend
from remend.cli import run
from remend.data.request_files import read_requests
from remend.editors import make_or_load
from remend.errors import ConfigError, ModelError
from remend.expansion.premise import Premise
from remend.expansion.writers import KEY_VARIABLE, LocalWriter, RemoteWriter, remote_writer, written_phrasings
from remend.request import Chat, EditRequest

REQUEST = EditRequest(prompt="The capital of Canada is", target="Toronto", subject="Canada")
ANSWER = """Here you are:
1. "The capital city of Canada is …"
- The town that serves as the capital of Canada is
The capital of France is
The capital of Canada is Toronto
The capital of Canada is
3) The capital city of Canada is
The official language of Canada is
The capital of Canada is a city called:
"""


class Fixed:
    """A writer that says what it is told to."""

    name = "fixed"

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def write(self, instruction):
        self.asked.append(instruction)
        return self.answer


@pytest.fixture(scope="module")
def premise():
    task = remend.load("atlas")
    return Premise.of(task, REQUEST, make_or_load("fit", task, (), 0).questions)


def test_what_is_written_is_checked(premise):
    writer = Fixed(ANSWER)
    found = list(written_phrasings(premise, writer, 4))
    assert [item.prompt for item in found] == [
        "The capital city of Canada is",
        "The town that serves as the capital of Canada is",
    ]
    assert {(item.item, item.kind, item.made) for item in found} == {("phrasing", "written", "written by fixed")}
    (asked,) = writer.asked
    assert "The capital of Canada is …" in asked
    assert "Name Canada in each" in asked
    assert [item.prompt for item in written_phrasings(premise, writer, 1)] == ["The capital city of Canada is"]


def test_questions_are_written_for_questions():
    task = remend.load("atlas")
    question = REQUEST.model_copy(
        update={"prompt": Chat.of([{"role": "user", "content": "What is the capital of Canada?"}])}
    )
    asked = Premise(
        task, make_or_load("fit", task, (), 0).questions, question, question, None, None, frozenset(), "Ottawa"
    )
    writer = Fixed("Which city is Canada's capital?\nThe capital of Canada is\nIs Ottawa the capital of Canada?\nWhy?")
    (found,) = written_phrasings(asked, writer, 4)
    assert isinstance(found.prompt, Chat)
    assert found.prompt.messages[-1].content == "Which city is Canada's capital?"


def test_a_model_without_a_chat_template_writes_nothing():
    with pytest.raises(ConfigError, match="atlas is no chat model"):
        LocalWriter(remend.load("atlas"), "atlas")


@pytest.fixture
def server():
    """An OpenAI-compatible server, and what it was asked; ``answers`` are (status, body, headers) in turn."""

    class Handler(BaseHTTPRequestHandler):
        asked, answers = [], []

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.asked.append((self.path, dict(self.headers), json.loads(body)))
            status, content, headers = self.answers.pop(0)
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

    started = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=started.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{started.server_address[1]}/v1", Handler
    started.shutdown()
    started.server_close()


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode(), {}


def test_a_writer_is_asked_at_its_address_only(server):
    address, handler = server
    handler.answers += [completion("fine"), (302, b"", {"Location": f"{address}/elsewhere"}), (500, b"overloaded", {})]
    handler.answers += [(200, b"<html>", {}), (200, b'{"choices": []}', {})]
    writer = RemoteWriter(f"{address}/", "some-model", "secret")
    assert writer.write("Write.") == "fine"
    path, headers, content = handler.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (content["model"], content["messages"]) == ("some-model", [{"role": "user", "content": "Write."}])
    for said in ("answers 302", "answers 500: 'overloaded'", "no chat completion: '<html>'", "no chat completion"):
        with pytest.raises(ModelError, match=said):
            writer.write("Write.")
    assert len(handler.asked) == 5, "no redirection is followed"
    with pytest.raises(ModelError, match="cannot be asked"):
        RemoteWriter("http://127.0.0.1:1/v1", "some-model").write("Write.")
    with pytest.raises(ModelError, match="cannot be asked"):
        RemoteWriter("http://", "some-model").write("Write.")


def test_the_command_asks_a_writer(server, tmp_path, monkeypatch, capsys):
    address, handler = server
    handler.answers.append(completion(ANSWER))
    monkeypatch.setenv(KEY_VARIABLE, "of the environment")
    out = tmp_path / "set.jsonl"
    command = ["expand", "atlas", "--prompt", REQUEST.prompt, "--target", "Toronto", "--rounds", "0", "--out", str(out)]
    assert run([*command, "--writer", address]) == 2
    assert "--writer-model NAME" in capsys.readouterr().err
    assert run([*command, "--writer-model", "some-model"]) == 2
    assert run([*command, "--writer", address, "--writer-model", "some-model"]) == 0
    assert handler.asked[0][1]["Authorization"] == "Bearer of the environment"
    (request,) = read_requests(out)
    assert "The capital city of Canada is" in request.given_paraphrases
    assert '"made": "written by some-model"' in out.read_text()
    with pytest.raises(ConfigError, match="name the model"):
        remote_writer(address, None)
