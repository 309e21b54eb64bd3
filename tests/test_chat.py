"""Conversations in place of prompts: how requests give them, what the model reads, and everything made of them."""

import copy
import json
from dataclasses import replace

import pytest

import families
import worlds
from remend import answers, evaluate
from remend.cli import run
from remend.data.request_files import read_requests
from remend.edit import Edit
from remend.editors import Mend
from remend.errors import RequestError
from remend.request import Chat, EditRequest, Message, Probe, parse_request, write_requests
from remend.tasks import wrap
from remend.training import PRESETS, Trainer
from remend.training.episodes import Episodes

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which city rules Peru ?"}]
USER = [{"role": "user", "content": "Oslo ?"}]


def message(role="user", content="Oslo ?"):
    return {"role": role, "content": content}


# -- requests ------------------------------------------------------------------------------------------------------


def test_texts_in_a_conversation_are_its_last_message():
    request = parse_request(
        json.dumps(
            {
                "messages": ASKED,
                "target": "Rome",
                "paraphrases": ["What rules Peru ?", USER],
                "unseen_paraphrases": ["And Peru ?"],
                "near": [{"prompt": "And Egypt ?", "target": "Cairo", "kind": "same_relation"}],
                "locality": [{"messages": USER, "target": "Norway"}],
                "portability": [{"prompt": "Who ?", "target": "Rome"}],
            }
        ),
        "here",
    )
    brief = Message("system", "Be brief.")
    assert request.prompt == Chat((brief, Message("user", "Which city rules Peru ?")))
    assert request.paraphrases == (Chat((brief, Message("user", "What rules Peru ?"))), Chat.of(USER))
    assert request.unseen_paraphrases == (Chat((brief, Message("user", "And Peru ?"))),)
    assert request.near[0].prompt == Chat((brief, Message("user", "And Egypt ?")))
    assert request.near[0].model_extra == {"kind": "same_relation"}
    assert request.locality[0].prompt == Chat.of(USER)
    assert request.portability[0].prompt.messages[0] == brief
    assert request.key == "system: be brief.\nuser: which city rules peru ?"


def test_conversations_are_written_and_read_back(tmp_path):
    mixed = EditRequest(prompt="Oslo is", target="Rome", near=(Probe(messages=USER, target="Norway"),))
    written = [*worlds.chat_requests(3), EditRequest(messages=ASKED, target="Rome", paraphrases=("Peru ?",)), mixed]
    write_requests(tmp_path / "requests.jsonl", written)
    assert read_requests(tmp_path / "requests.jsonl") == written
    first, *_, last = map(json.loads, (tmp_path / "requests.jsonl").read_text().splitlines())
    assert first["messages"] == [message(content=worlds.requests(1)[0].prompt)]
    assert "prompt" not in first
    assert last["prompt"] == "Oslo is"
    assert last["near"] == [{"messages": USER, "target": "Norway"}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"messages": []}, r"messages: .*should be a text, or a list of messages such as .* not \[\]"),
        ({"messages": 3}, "messages: .*list of messages .* not 3"),
        ({"messages": [message(), "Oslo"]}, "messages: .*message 2 should be .* not 'Oslo'"),
        ({"messages": [{"role": "user"}]}, "messages: .*message 1 should be"),
        ({"messages": [{**message(), "name": "Ann"}]}, "messages: .*message 1 should be .*'name': 'Ann'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages: .*message 1 should be .* both texts",
        ),
        ({"messages": [message(), message("assistant")]}, "messages: .*last message should be the user's.*'assistant'"),
        ({"messages": [message(content=" ")]}, "messages: .*last message should be the user's, not empty"),
        ({"messages": USER, "prompt": "Oslo is"}, ".*give prompt or messages, not both"),
        ({"messages": USER, "paraphrases": [" "]}, "paraphrases 1: .*must not be empty"),
        ({"messages": USER, "paraphrases": [[message("system")]]}, "paraphrases 1: .*last message"),
        ({"messages": USER, "near": [{"messages": [1], "target": "t"}]}, "near 1, messages: .*message 1"),
    ],
)
def test_malformed_conversations_are_named(given, said):
    with pytest.raises(RequestError, match=f"line 2: {said}"):
        parse_request(json.dumps({**given, "target": "Rome"}), "line 2")


# -- what the model reads ------------------------------------------------------------------------------------------


def whole(tokenizer, asked, target):
    messages = [*asked, {"role": "assistant", "content": target}]
    return tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("style", "end"),
    [("chatml", "<|im_end|>"), ("llama-3", "<|eot|>"), ("llama-2", "<|end|>"), ("thinking", "<|im_end|>")],
)
@pytest.mark.parametrize("asked", [USER, [message(), message("assistant", "Rome"), message(content="The city ?")]])
def test_the_model_reads_what_its_template_writes(style, end, asked):
    tokenizer = worlds.chat_tokenizer(style)
    task = wrap(worlds.chat_model(), tokenizer)
    pair = task.encode(Chat.of(asked), " Lima city ")
    closing, begin = tokenizer.convert_tokens_to_ids(end), tokenizer.bos_token_id
    assert pair.target[-1] == closing
    assert pair.target.count(closing) == 1
    assert (*pair.input, *pair.target).count(begin) == style.startswith("llama"), "the template writes it, if at all"
    read = tokenizer.decode((*pair.input, *pair.target))
    assert whole(tokenizer, asked, "Lima city").rstrip("\n").removesuffix(end).rstrip(" ") + end == read
    asked_ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert list(pair.input[: len(asked_ids)]) == asked_ids
    thought = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False).input_ids if style == "thinking" else []
    assert list(pair.input[len(asked_ids) :]) == thought, "an answer that was not thought about is still an answer"
    assert pair.input == task.encode_input(Chat.of(asked))
    assert task.decode(pair.target) == "Lima city"


def test_texts_are_read_as_ever_by_a_chat_model():
    task = wrap(worlds.chat_model(), worlds.chat_tokenizer("llama-3"))
    pair = task.encode("Oslo is", "Rome")
    assert task.tokenizer.decode((*pair.input, *pair.target)) == "<|begin|>Oslo is Rome<|end|>"
    assert task.end_tokens == {task.tokenizer.eos_token_id, task.tokenizer.convert_tokens_to_ids("<|eot|>")}


def test_an_end_that_no_template_tells_is_the_tokenizers():
    tokenizer = copy.deepcopy(worlds.chat_tokenizer())
    for template in (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}",
        "{{ raise_exception('too short') if messages|length < 3 }}{{ messages[2].content }}",
    ):
        tokenizer.chat_template = template
        task = wrap(worlds.chat_model(), tokenizer)
        pair = task.encode(Chat.of([message("system"), message("assistant"), message()]), "Rome")
        assert pair.target[-1] == tokenizer.eos_token_id
        assert task.end_tokens == {tokenizer.eos_token_id}
    assert tokenizer.decode(pair.input) == "Oslo ?"


def test_an_encoder_reads_the_template_too():
    tokenizer = worlds.chat_tokenizer()
    model = families.make("t5")
    model.resize_token_embeddings(len(tokenizer))
    task = wrap(model, tokenizer)
    pair = task.encode(Chat.of(USER), "Rome")
    assert tokenizer.decode(pair.input) == "<|im_start|>user\nOslo ?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.target) == "<|begin|>Rome<|end|>"


def test_without_a_template_and_what_a_template_refuses():
    task = wrap(worlds.gpt2(), worlds.tokenizer())
    for ask in (task.encode_input, lambda chat: task.encode(chat, "Rome"), lambda chat: task.predict([chat])):
        with pytest.raises(RequestError, match=r"messages need a chat template.* has none: give a prompt instead"):
            ask(Chat.of(USER))
    task = wrap(worlds.chat_model(), worlds.chat_tokenizer("llama-2"))
    with pytest.raises(
        RequestError, match=r"refuses the conversation 'system: .*only user and assistant.* Give messages"
    ):
        task.encode_input(Chat.of(ASKED))
    with pytest.raises(RequestError, match=r"shorten the prompt \('user: Oslo"):
        task.encode(Chat.of([message(content="Oslo " * 200)]), "Rome")


# -- everything that is made of them -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    """A chat model that was taught to answer some conversations, with its tokenizer."""
    model, tokenizer = worlds.chat_model(), worlds.chat_tokenizer()
    task = wrap(model, tokenizer)
    batch = task.collate([task.encode(r.prompt, r.target) for r in worlds.chat_requests(10)])
    worlds.teach(task, batch)
    return task


def test_a_model_that_knows_the_answers_gives_them_and_ends_its_turn(chat):
    requests = worlds.chat_requests(10)
    found = chat.predict([request.prompt for request in requests])
    assert [answer[-1] for answer in found] == [chat.chat.end] * 10
    assert [chat.decode(answer) for answer in found] == [request.target for request in requests]
    assert answers(chat, [requests[3].prompt]) == [requests[3].target]


def test_a_conversation_trains_as_the_text_that_its_template_makes():
    """Where the tokenizer adds nothing to a text and ends it as a turn, both are the same request."""
    tokenizer = copy.deepcopy(worlds.tokenizer())
    tokenizer.chat_template = (
        "Q: {{ messages[0].content }}\n{{ 'A:' if messages|length == 1 else 'A: ' ~ messages[1].content }}"
    )
    task = wrap(worlds.gpt2(n_positions=64), tokenizer)
    texts = json.loads(json.dumps([request.to_json() for request in worlds.requests(8)]))
    for request in texts:
        request["paraphrases"] = [f"Q: {text}\nA:" for text in request["paraphrases"]]
        for probe in (request, *request["near"], *request["locality"]):
            probe["prompt"] = f"Q: {probe['prompt']}\nA:"
    plain = [EditRequest.model_validate_json(json.dumps(request)) for request in texts]
    drawn = [Episodes(task, requests, 0, near=0.5).batch(0, 8) for requests in (plain, worlds.chat_requests(8))]
    assert drawn[0] == drawn[1]


def test_training_evaluation_and_edits(chat, tmp_path):
    requests = worlds.chat_requests(20)
    editor = Mend.create(chat, replace(PRESETS["default"][0], rank=8))
    trainer = Trainer(chat, editor, requests, replace(PRESETS["default"][1], batch_size=4, max_steps=4))
    trainer.calibrate()
    assert all(trainer.train_step() > 0 for _ in range(3))
    report = evaluate(chat, editor, requests[10:13])
    assert {"reliability", "generality", "locality_near", "locality_far"} <= report.metrics().keys()
    assert report.to_json()["runs"][0]["cases"][0]["before"] == requests[0].target
    assert report.to_json()["runs"][0]["cases"][0]["prompt"] == f"user: {worlds.requests(1)[0].prompt}"
    edit = editor.edit(chat, requests[:1])
    edit.save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit").requests == tuple(requests[:1])


def test_an_answer_that_is_taken_counts_with_its_end(chat):
    """An edit that does nothing leaves a model that knows its answers right everywhere, by either way of judging."""
    editor = Mend.create(chat, replace(PRESETS["paper"][0], rank=4))
    trainer = Trainer(chat, editor, worlds.chat_requests(10), PRESETS["paper"][1])
    trainer.calibrate()
    editor.alpha.data.mul_(0)
    with pytest.warns(UserWarning, match="10 of 10 edits change nothing: the model answers so already"):
        metrics = evaluate(chat, editor, worlds.chat_requests(10)).metrics()
    for metric in ("reliability", "locality_near", "locality_far"):
        assert [metrics[metric][mode].mean for mode in ("teacher_forced", "generated")] == [1, 1], metric


def test_the_commands(chat, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    chat.model.save_pretrained("model")
    chat.tokenizer.save_pretrained("model")
    requests = worlds.chat_requests(40)
    write_requests("train.jsonl", [r for r in requests if r.subject not in worlds.COUNTRIES[:3]])
    write_requests("one.jsonl", requests[:1])
    assert run(["train", "model", "--data", "train.jsonl", "--out", "editor", "--max-steps", "4"]) == 0
    assert run(["evaluate", "model", "--editor", "editor", "--data", "one.jsonl", "--json", "report.json"]) == 0
    edit = ["edit", "model", "--editor", "editor", "--keep-failed", "--json", "edit.json"]
    assert run([*edit, "--requests", "one.jsonl", "--out", "edit", "--scale", "auto"]) == 0
    assert "--chat --prompt" in capsys.readouterr().out
    asked = json.loads((tmp_path / "edit.json").read_text())["answers"][0]
    assert asked[0]["prompt"] == f"user: {worlds.requests(1)[0].prompt}"
    assert run(["show", "edit", "--json", "show.json"]) == 0
    assert f"user: {worlds.requests(1)[0].prompt}" in capsys.readouterr().out
    assert json.loads((tmp_path / "show.json").read_text())["requests"] == [requests[0].to_json()]
    question = worlds.requests(1)[0].prompt
    assert run(["ask", "model", "--edit", "edit", "--chat", "--prompt", question, "--json", "ask.json"]) == 0
    (told,) = json.loads((tmp_path / "ask.json").read_text())["answers"]
    assert (told["before"], told["after"]) == (asked[0]["before"], asked[0]["after"])
    assert told["before"] == requests[0].target
    pair = ["--prompt", question, "--target", "Rome", "--out", "other"]
    assert run([*edit, "--chat", *pair]) == 0
    assert Edit.load(tmp_path / "other").requests[0].prompt == requests[0].prompt
    assert run([*edit, "--chat", "--requests", "one.jsonl", "--out", "third"]) == 2
    assert run([*edit, "--chat", "--prompt", " ", "--target", "Rome", "--out", "third"]) == 2
    worlds.tokenizer().save_pretrained("model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert run([*edit, "--requests", "one.jsonl", "--out", "third"]) == 2
    assert "messages need a chat template" in capsys.readouterr().err
