"""Encoder-decoders: what their tokenizers do, and what the decoder is asked."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    BartForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import families
import worlds
from remend.editors import Mend
from remend.errors import ConfigError, ModelError, RequestError, TrainingError
from remend.tasks import Example, answers, load, wrap
from remend.tasks.seq2seq import Seq2SeqLM
from remend.training import PRESETS, Trainer


def framed(before=(), after=()):
    """The suite's tokenizer, putting special tokens around every text as T5's (an end) or BART's (both) does."""
    plain = worlds.tokenizer()
    raw = type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str())
    special = [(token, raw.token_to_id(token)) for token in {*before, *after}]
    raw.post_processor = TemplateProcessing(single=" ".join([*before, "$A", *after]), special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>")


@pytest.mark.parametrize(("before", "after"), [((), ()), ((), ("<|end|>",)), (("<|pad|>",), ("<|end|>",))])
def test_each_side_is_tokenised_as_its_tokenizer_does(before, after):
    tokenizer = framed(before, after)
    task = wrap(families.make("bart"), tokenizer)
    assert isinstance(task, Seq2SeqLM)
    pair = task.encode("The capital of Peru is ", " Lima ")
    assert (
        list(pair.input)
        == tokenizer("The capital of Peru is").input_ids
        == list(task.encode_input("The capital of Peru is"))
    )
    assert pair.target.count(tokenizer.eos_token_id) == 1
    assert pair.target[-1] == tokenizer.eos_token_id
    assert (pair.target[0] == tokenizer.pad_token_id) == bool(before), "a beginning token is a part of the answer"
    assert task.decode(pair.target) == "Lima"
    for prompt, target in ((" ", "Lima"), ("", "Lima"), ("Peru", " ")):
        with pytest.raises(RequestError, match="holds no text"):
            task.encode(prompt, target)
    with pytest.raises(RequestError, match="shorten the target"):
        task.encode("Peru", "Lima " * 70)


def test_batches_are_the_models_own():
    """Where the decoder is shown the start token and the target, padded, each token is predicted as without padding."""
    task = wrap(families.make("bart"), worlds.tokenizer())
    pairs = [task.encode(r.prompt, r.target) for r in worlds.requests(3)]
    pairs.append(task.encode("Which city rules Peru ? It is the capital of the city", "Lima is the capital"))
    batch = task.collate(pairs)
    assert batch.first_position.tolist() == [0] * 4
    assert batch.predicting.equal(batch.decoder_mask)
    with torch.no_grad():
        together = task.outputs(batch)
        alone = torch.cat([task.outputs(task.collate([pair])) for pair in pairs])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        pair = pairs[-1]
        output = task.model(
            input_ids=torch.tensor([pair.input]),
            decoder_input_ids=torch.tensor([[task.start, *pair.target[:-1]]]),
        )
    torch.testing.assert_close(together[-len(pair.target) :], output.logits[0], rtol=1e-4, atol=1e-4)


def test_free_answers_are_those_of_generate():
    task = wrap(families.make("t5"), worlds.tokenizer())
    prompts = [request.prompt for request in worlds.requests(6)]
    for prompt, own in zip(prompts, task.predict(prompts, 6), strict=True):
        ids = torch.tensor([task.encode_input(prompt)])
        made = task.model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=1)[0, 1:]
        assert tuple(made.tolist()[: len(own)]) == own
    assert answers(task, prompts[:1], 3) == [task.decode(task.predict(prompts[:1], 3)[0])]


def test_a_decoder_without_a_beginning_is_refused():
    model = families.make("bart")
    model.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="has no decoder_start_token_id"):
        wrap(model, worlds.tokenizer())


def test_named_blocks_are_those_of_both_stacks():
    model = families.make("bart")
    assert {name.split(".")[1] for name in Mend.create(worlds.task(model)).shapes} == {"encoder", "decoder"}
    chosen = Mend.create(worlds.task(model), layers="0").shapes
    assert {tuple(name.split(".")[1:4:2]) for name in chosen} == {("encoder", "0"), ("decoder", "0")}


def test_what_an_encoder_cannot_do_is_refused():
    model, default = families.make("t5"), PRESETS["default"][0]
    with pytest.raises(ConfigError, match="lies in the encoder, where no target is predicted"):
        Mend.create(worlds.task(model), default, modules=["*encoder.block.0.*.wo"])
    task = wrap(model, worlds.tokenizer())
    trainer = Trainer(
        task, Mend.create(worlds.task(model), default), worlds.requests(8), PRESETS["default"][1], text=["Oslo"]
    )
    with pytest.raises(TrainingError, match="train without text"):
        trainer.calibrate()


def test_loading_an_encoder_decoder(tmp_path):
    made = families.make("bart")
    made.save_pretrained(tmp_path)
    worlds.tokenizer().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).is_encoder_decoder
    task = load(str(tmp_path), "cpu")
    assert isinstance(task.model, BartForConditionalGeneration)
    pair = Example(tuple(task.encode_input("Oslo")), (1, 2))
    with torch.no_grad():
        torch.testing.assert_close(
            task.outputs(task.collate([pair])), wrap(made, task.tokenizer).outputs(task.collate([pair]))
        )


def test_the_longest_text_is_the_longest_that_each_side_can_read():
    """Encoder and decoder may have contexts of different lengths, or, with relative positions, none."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "attention_window": 4}
    sizes |= {"max_encoder_position_embeddings": 40, "max_decoder_position_embeddings": 12}
    special = {"vocab_size": families.VOCABULARY, "decoder_start_token_id": families.END, "pad_token_id": 0}
    led = LEDForConditionalGeneration(LEDConfig(**sizes, **special, eos_token_id=families.END)).eval()
    for model, lengths in ((led, (40, 12)), (families.make("bart"), (64, 64)), (families.make("t5"), (None, None))):
        task = wrap(model, worlds.tokenizer())
        assert (task.context, task.answer_context) == lengths
        longest, longest_answer = (length or 100 for length in lengths)
        prompt, target = "!" * longest, "!" * (longest_answer - 1)
        assert len(task.predict([prompt], 100)[0]) <= longest_answer
        task.outputs(task.collate([task.encode(prompt, target)]))
        if lengths[0] is None:
            continue
        for ask in (lambda text, task=task: task.predict([text]), lambda text, task=task: task.encode(text, "!")):
            with pytest.raises(RequestError, match=f"the prompt takes .* holds {longest}: shorten the prompt"):
                ask(prompt + "!")
        with pytest.raises(RequestError, match=f"the target takes .* holds {longest_answer}: shorten the target"):
            task.encode(prompt, target + "!")
