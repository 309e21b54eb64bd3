"""Classifiers: labels, where the head reads, pairs of texts, and the closed forms for two labels."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from torch.nn import functional

import families
import remend
import worlds
from remend.cli import run
from remend.core.losses import locality_loss
from remend.editors import make
from remend.errors import ModelError, RequestError
from remend.models.editable_matrices import editable_modules
from remend.request import EditRequest, TextPair, parse_request
from remend.tasks import Example, answers, wrap
from remend.tasks.class_labels import label_number
from remend.tasks.text_classification import TextClassification

READING = {"bert": "first", "roberta": "first", "distilbert": "first", "deberta-v2": "first", "electra": "first"}
READING |= {"modernbert": "all", "gpt2": "last"}


@pytest.fixture(scope="module")
def task():
    return families.task("bert, binary")


@pytest.mark.parametrize("encoder", READING)
def test_where_the_head_reads_is_found(encoder):
    task = families.task(f"{encoder}, binary")
    assert isinstance(task, TextClassification)
    assert task.reading == READING[encoder]
    pairs = [task.encode(prompt, "true") for prompt in ("The capital of Peru is Lima", "Peru has Lima")]
    batch = task.collate(pairs)
    read = {"first": [0, 0], "last": [7, 4], "all": [0, 0]}[task.reading]
    assert batch.first_position.tolist() == read
    counted = task.token_masks(batch, ["some"], predicting=True)["some"]
    assert counted.sum(1).tolist() == ([8, 5] if task.reading == "all" else [1, 1])


@pytest.mark.parametrize("family", families.CLASSIFIERS)
def test_padding_changes_nothing(family):
    task = families.task(family)
    prompts = ["The capital of Peru is Lima", "Peru has Lima", "Which city rules Egypt ? It is Cairo"]
    pairs = [Example(tuple(task.encode_input(prompt)), (0,)) for prompt in prompts]
    with torch.no_grad():
        together = task.outputs(task.collate(pairs))
        apart = torch.cat([task.outputs(task.collate([pair])) for pair in pairs])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_one_output_is_a_bernoulli_distribution_in_closed_form():
    task = families.task("bert, one output")
    assert task.labels == ("false", "true")
    batch = task.collate([task.encode(r.prompt, r.target) for r in families.requests("bert, one output", 6)])
    with torch.no_grad():
        z = task.model(input_ids=batch.inputs["input_ids"], attention_mask=batch.mask.long()).logits[:, 0]
        logits = task.outputs(batch)
        expected = functional.binary_cross_entropy_with_logits(z, batch.target.float(), reduction="none")
        torch.testing.assert_close(task.loss(batch), expected)
        p, q = z.sigmoid(), (z + 0.7).sigmoid()
        divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        found = locality_loss(logits, logits + torch.tensor([0, 0.7]), batch.row, 6)
    torch.testing.assert_close(found, divergence, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding", [None, -1])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen2"])
def test_a_decoder_without_a_padding_token_classifies_as_one_text_alone(family, padding):
    """Saved as most are: the head must read each text's last token, whatever its number."""
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": families.VOCABULARY, "num_labels": 3}
    makers = {
        "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**sizes, pad_token_id=padding)),
        "mistral": lambda: hf.MistralForSequenceClassification(hf.MistralConfig(**sizes, pad_token_id=padding)),
        "qwen2": lambda: hf.Qwen2ForSequenceClassification(hf.Qwen2Config(**sizes, pad_token_id=padding)),
        "gpt2": lambda: hf.GPT2ForSequenceClassification(
            hf.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=families.VOCABULARY, num_labels=3)
        ),
    }
    torch.manual_seed(0)
    model = makers[family]().eval()
    model.config.pad_token_id = None  # as users have it
    tokenizer = worlds.tokenizer()
    task = wrap(model, tokenizer)
    model.config.pad_token_id = padding
    assert task.reading == "last"
    texts = ["The capital of Peru is!", "Peru", "!!", "a"]  # "!" is token 0
    examples = [task.encode(text, "2") for text in texts]
    together = task.outputs(task.collate(examples))
    model.config.pad_token_id = None
    alone = torch.cat([model(input_ids=torch.tensor([example.input])).logits for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert task.collate(examples).position.tolist() == [len(example.input) - 1 for example in examples]
    ridge = make("ridge", task)
    edit = ridge.edit(task, [EditRequest(prompt=texts[0], target="LABEL_2"), EditRequest(prompt="Peru", target="1")])
    assert edit.changes
    assert model.config.pad_token_id is None, "nothing is left on the model"


def test_labels_that_differ_in_case_are_told_apart():
    assert label_number("b", ("B", "b")) == 1
    assert label_number("B", ("B", "b")) == 0
    assert label_number("YES", ("no", "yes")) == 1
    assert label_number("1", ("1", "0")) == 0, "a name goes before a number"
    with pytest.raises(RequestError, match=r"several labels 'Yes' that differ in case, \['YES', 'yes'\]"):
        label_number("Yes", ("YES", "yes"))
    for number in ("１", "²", "-1", "1.0"):
        with pytest.raises(RequestError, match="no label"):
            label_number(number, ("no", "yes"))


LONGEST = {"roberta": 30, "bert": 32, "electra": 32}
"""Tokens that models with tables of 32 positions read; RoBERTa counts positions from its padding token's number on."""


@pytest.mark.parametrize("family", LONGEST)
def test_the_longest_text_is_the_longest_that_the_model_can_read(family):
    configs = {"roberta": hf.RobertaConfig, "bert": hf.BertConfig, "electra": hf.ElectraConfig}
    models = {
        "roberta": hf.RobertaForSequenceClassification,
        "bert": hf.BertForSequenceClassification,
        "electra": hf.ElectraForSequenceClassification,
    }
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    padding = 1 if family == "roberta" else 0
    config = configs[family](**sizes, max_position_embeddings=32, vocab_size=64, pad_token_id=padding)
    task = wrap(models[family](config).eval(), worlds.word_tokenizer())
    longest = LONGEST[family]
    assert task.context == longest
    text = "The " * (longest - 2)  # between [CLS] and [SEP]
    assert task.predict([text])
    for ask in (task.predict, lambda prompts: task.encode(prompts[0], "0"), lambda prompts: answers(task, prompts)):
        with pytest.raises(RequestError, match=rf"takes? {longest + 1} tokens.* holds {longest}: shorten the prompt"):
            ask([text + "The"])
    ids = torch.full((1, longest + 1), 5)
    with pytest.raises((IndexError, RuntimeError)):  # a longer text is one that the model fails on
        task.model(input_ids=ids)


def test_labels_are_named_or_numbered(task):
    assert task.encode("Peru has Lima", "TRUE ").target == (1,)
    assert task.encode("Peru has Lima", "0").target == (0,)
    assert task.decode((1,)) == "true"
    assert task.end_tokens == frozenset()
    for wrong in ("maybe", "2", "-1"):
        with pytest.raises(RequestError, match=rf"no label '{wrong}'.*from 0 to 1"):
            task.encode("Peru has Lima", wrong)
    with pytest.raises(RequestError, match="no text"):
        task.encode("   ", "true")
    with pytest.raises(RequestError, match="context holds 64"):
        task.encode("Peru " * 70, "true")


def test_a_pair_of_texts_is_shown_as_two():
    task = families.task("bert, binary")
    request = parse_request('{"prompt": ["Peru has Lima", "It is Lima"], "target": "true"}', "here")
    assert request.prompt == TextPair("Peru has Lima", "It is Lima")
    assert parse_request(json.dumps(request.to_json()), "again") == request
    shown = {}
    handle = task.model.bert.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: shown.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        batch = task.collate([task.encode(request.prompt, "true"), task.encode("The capital of Peru", "true")])
        found = task.outputs(batch)
    handle.remove()
    expected = worlds.word_tokenizer()("Peru has Lima", "It is Lima", return_tensors="pt")
    assert batch.inputs["input_ids"][0].tolist() == expected.input_ids[0].tolist()
    assert shown["token_type_ids"][0].tolist() == [0] * 5 + [1] * 4
    assert shown["token_type_ids"][1].sum() == 0
    with torch.no_grad():
        types = torch.tensor([[0] * 5 + [1] * 4])
        right = task.model(input_ids=expected.input_ids, token_type_ids=types).logits[0]
    torch.testing.assert_close(found[0], right, rtol=1e-4, atol=1e-5)
    words = worlds.word_tokenizer()
    asked = [["Peru has Lima", "It is Lima"], request.prompt]
    assert len(set(remend.answers(wrap(task.model, words), asked))) == 1
    with pytest.raises(RequestError, match="a list of prompts"):
        remend.answers(wrap(task.model, words), "Peru has Lima")
    with pytest.raises(RequestError, match="this list has 3"):
        remend.answers(wrap(task.model, words), [["Peru", "has", "Lima"]])
    with pytest.raises(RequestError, match="not a pair"):
        wrap(worlds.gpt2(), worlds.tokenizer()).encode(request.prompt, "true")
    with pytest.raises(RequestError, match="not a conversation"):
        task.encode(remend.Chat.of([{"role": "user", "content": "Peru has Lima"}]), "true")


@pytest.mark.parametrize("name", ["roberta, binary", "deberta-v2, binary", "distilbert, binary"])
def test_a_pair_of_texts_goes_to_models_that_know_no_segments(name):
    """RoBERTa's table of segments has one row, DeBERTa's none; DistilBERT takes no such input."""
    task = families.task(name)
    pair = task.encode(TextPair("Peru has Lima", "It is Lima"), "true")
    with torch.no_grad():
        found = task.outputs(task.collate([pair]))
        expected = task.model(input_ids=torch.tensor([pair.input])).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_classifier_with_one_label_is_refused():
    words, config = worlds.word_tokenizer(), families.make("bert, binary").config
    with pytest.raises(ModelError, match="neither a language model nor a sequence classifier"):
        wrap(hf.BertModel(config), words)
    with pytest.raises(ModelError, match="several labels"):
        wrap(
            hf.BertForSequenceClassification(
                hf.BertConfig(**{**config.to_dict(), "problem_type": "multi_label_classification"})
            ),
            words,
        )
    bart = hf.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, vocab_size=40)
    with pytest.raises(ModelError, match="encoder and a decoder"):
        wrap(hf.BartForSequenceClassification(bart), words)


@pytest.mark.filterwarnings("ignore:the tokenizer cannot write")
def test_the_whole_way_from_a_folder(tmp_path, capsys):
    """Train, evaluate, edit and ask from the command line, with a classifier that transformers saved."""
    model = families.make("bert, binary")
    model.save_pretrained(tmp_path / "model")
    worlds.word_tokenizer().save_pretrained(tmp_path / "model")
    remend.request.write_requests(tmp_path / "train.jsonl", families.requests("bert, binary", 30))
    loaded = remend.load(str(tmp_path / "model"), "cpu").model
    assert isinstance(loaded, hf.BertForSequenceClassification)
    assert list(editable_modules(loaded, outputs_only=True)) == [
        f"bert.encoder.layer.{block}.output.dense" for block in (1, 2, 3)
    ]

    def ran(*arguments):
        assert run([str(argument) for argument in arguments]) == 0
        return " ".join(capsys.readouterr().out.split())

    base, editor = tmp_path / "model", tmp_path / "editor"
    ran("train", base, "--data", tmp_path / "train.jsonl", "--out", editor, "--max-steps", 20, "--device", "cpu")
    ran(
        "evaluate",
        base,
        "--editor",
        editor,
        "--data",
        tmp_path / "train.jsonl",
        "--device",
        "cpu",
        "--json",
        tmp_path / "r.json",
    )
    assert json.loads((tmp_path / "r.json").read_text())["runs"][0]["metrics"]
    request = families.requests("bert, binary", 1)[0]
    before = remend.answers(wrap(loaded, worlds.word_tokenizer()), [request.prompt])[0]
    other = {"true": "false", "false": "true"}[before]
    arguments = ("--prompt", request.prompt, "--target", other, "--out", tmp_path / "edit", "--device", "cpu")
    run([str(a) for a in ("edit", base, "--editor", editor, *arguments)])
    capsys.readouterr()
    shown = ran("ask", base, "--edit", tmp_path / "edit", "--prompt", request.prompt, "--device", "cpu")
    assert before in shown
    two = ("--pair", "--prompt", "Peru has Lima", "--prompt", "It is Lima")
    pair = ("--keep-failed", *two, "--target", other, "--out", tmp_path / "pair")
    run([str(a) for a in ("edit", base, "--editor", editor, *pair, "--device", "cpu")])
    assert "--edit " + str(tmp_path / "pair") + " --pair --prompt '…' --prompt '…'" in capsys.readouterr().out
    assert remend.Edit.load(tmp_path / "pair").requests[0].prompt == TextPair("Peru has Lima", "It is Lima")
    assert "Peru has Lima / It is Lima" in ran("ask", base, "--edit", tmp_path / "pair", *two, "--device", "cpu")
    assert run(["doctor", str(base), "--device", "cpu"]) == 2
    assert "give --data" in capsys.readouterr().err
    edit = remend.Edit.load(tmp_path / "edit")
    assert edit.requests[0].target == other
    with pytest.raises(RequestError, match="no label"):
        remend.Mend.load(editor).edit(wrap(loaded, worlds.word_tokenizer()), [EditRequest(prompt="Peru", target="x")])
