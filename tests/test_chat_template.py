"""Chat templates of many habits: the model reads the message, and the answer begins where the assistant's turn does."""

import copy
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizers_of
import worlds
from remend.errors import RequestError
from remend.request import Chat
from remend.tasks import wrap

PARTS = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
EITHER = "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"
OPENED = "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"


def chatml(content="{{ m.content }}", prompt="<|im_start|>assistant\n"):
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + content + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


TEMPLATES = {
    **worlds.CHAT_TEMPLATES,
    "opens a thought that answers do not have": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<Assistant>{{ m.content.split('</think>')[-1] }}"
        "{{ eos_token }}{% else %}<User>{{ m.content }}{% endif %}{% endfor %}" + OPENED
    ),
    "opens a thought that answers close": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<Assistant><think>\n\n</think>\n\n{{ m.content }}"
        "{{ eos_token }}{% else %}<User>{{ m.content }}{% endif %}{% endfor %}" + OPENED
    ),
    "parts": chatml(PARTS),
    "parts by index": chatml("{{ m.content[0]['text'] }}"),
    "parts or text": chatml(EITHER),
    "no generation prompt": chatml(prompt=""),
    "a space before the answer": chatml(prompt="<|im_start|>assistant "),
    "system in the last message of the user": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} "
        "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
ANSWERED_AFTER = {
    "opens a thought that answers do not have": "<Assistant>",
    "opens a thought that answers close": "<Assistant><think>\n\n</think>\n\n",
    "thinking": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "no generation prompt": "<|im_start|>assistant\n",
}
SCRIPTS = {
    "Latin": "Où est Genève ?",
    "Greek": "Ποια είναι η πόλη;",
    "Cyrillic": "Какой город?",
    "Arabic": "ما هي المدينة؟",
    "Hebrew": "מה העיר?",
    "Devanagari": "कौन सा शहर?",
    "Chinese": "哪个城市？",
    "Japanese": "どの都市ですか？",
    "Thai": "เมืองอะไร",
    "Korean": "어느 도시?",
}


def task_of(template):
    tokenizer = copy.deepcopy(worlds.chat_tokenizer())
    tokenizer.chat_template = template
    return wrap(worlds.llama(vocab_size=len(tokenizer), max_position_embeddings=1024), tokenizer)


TASKS = {name: task_of(template) for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=20)
@given(
    question=st.sampled_from([*SCRIPTS.values(), "user", "assistant\n", "{{ m }}", " spaced "]) | st.sampled_from("?a"),
    answer=st.sampled_from([*SCRIPTS.values(), "Lima", "<b>"]),
    system=st.sampled_from(["", "Be brief."]),
)
def test_the_message_is_read_and_the_answer_begins_the_turn(name, question, answer, system):
    task = TASKS[name]
    system = "" if name == "llama-2" else system  # it knows no such role
    chat = Chat.of(
        [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question}]
    )
    pair = task.encode(chat, answer)
    read = task.tokenizer.decode(pair.input)
    assert question.strip() in read.replace("<|im_start|>user", "").replace("<|im_start|>assistant", "")
    assert system in read
    assert read.endswith(ANSWERED_AFTER.get(name, ""))
    assert task.decode(pair.target) == answer
    assert pair.input == task.encode_input(chat)
    thought = read.rpartition("<think>")
    assert not thought[1] or "</think>" in thought[2], "an answer is no thought"


@functools.cache
def task_of_habit(habit):
    tokenizer = copy.deepcopy(tokenizers_of.tokenizer(habit))
    return wrap(worlds.llama(vocab_size=len(tokenizer), max_position_embeddings=2048), tokenizer)


@pytest.mark.parametrize("habit", [habit for habit in tokenizers_of.CAUSAL if "unigram" not in habit])
@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(list(TEMPLATES)),
    question=st.sampled_from(list(SCRIPTS)),
    answer=st.sampled_from(list(SCRIPTS)),
)
def test_whatever_the_tokenizer_the_answer_is_that_of_the_template(habit, name, question, answer):
    tokenizer = copy.deepcopy(tokenizers_of.tokenizer(habit))
    tokenizer.chat_template = TEMPLATES[name]
    task = wrap(task_of_habit(habit).model, tokenizer)
    pair = task.encode(Chat.of([{"role": "user", "content": SCRIPTS[question]}]), SCRIPTS[answer])
    read = tokenizer.decode(pair.input, clean_up_tokenization_spaces=False)
    assert SCRIPTS[question] in read
    assert read.endswith(ANSWERED_AFTER.get(name, ""))
    assert task.decode(pair.target) == SCRIPTS[answer]
    assert pair.input.count(tokenizer.bos_token_id) == ("llama" in name), "the template writes all special tokens"


def test_what_no_kind_of_content_saves_is_refused():
    task = task_of("{% for m in messages %}<User>{{ m.text }}{% endfor %}")
    with pytest.raises(RequestError, match=r"leaves out a message of 'user: Oslo \?'"):
        task.encode_input(Chat.of([{"role": "user", "content": "Oslo ?"}]))
    task = task_of("user: {% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}")
    with pytest.raises(RequestError, match="leaves out a message"):
        task.encode_input(Chat.of([{"role": "user", "content": "user"}]))


def test_a_generation_prompt_that_differs_between_conversations_is_refused():
    task = task_of(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{{ '<think>' if messages|length < 2 else '<thought>' }}{% endif %}"
    )
    question = {"role": "user", "content": "Oslo ?"}
    assert task.tokenizer.decode(task.encode_input(Chat.of([question]))) == "<user>Oslo ?<assistant>"
    with pytest.raises(RequestError, match="where the answer begins is unknown"):
        task.encode_input(Chat.of([question, {"role": "assistant", "content": "Rome"}, question]))
