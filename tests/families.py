"""Small random models of every family that the contract suite covers, with the suite's tokenizer's vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import transformers as hf

import worlds
from remend.core.low_rank import LowRank, layer_names
from remend.core.low_rank_hooks import frozen
from remend.edit import Edit
from remend.fingerprint import ModelFingerprint
from remend.models.blocks import find_stacks
from remend.models.editable_matrices import block_mlp
from remend.request import EditRequest, Probe
from remend.tasks import Task, wrap

VOCABULARY = len(worlds.tokenizer())
END = worlds.tokenizer().eos_token_id
BLOCKS = 4
TEXT = [
    f"{way.format(country)} {city}"
    for way in worlds.PHRASINGS
    for country in worlds.COUNTRIES
    for city in worlds.CITIES
]

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": END, "eos_token_id": END, "pad_token_id": 0}
_PLAIN = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, **_TOKENS}
_GROUPED = {**_PLAIN, "num_key_value_heads": 1, "max_position_embeddings": 64}
_HEADS = {**_GROUPED, "head_dim": 8}
_GPT = {"n_embd": 16, "n_layer": BLOCKS, "n_head": 2, "n_positions": 64, **_TOKENS}

DECODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT)),
    "gpt-neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            hidden_size=16,
            num_layers=BLOCKS,
            num_heads=2,
            attention_types=[[["global", "local"], BLOCKS // 2]],
            window_size=8,
            max_position_embeddings=64,
            **_TOKENS,
        )
    ),
    "gpt-j": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT, rotary_dim=4, tie_word_embeddings=False)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_PLAIN, max_position_embeddings=64)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=16,
            ffn_dim=40,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            **_TOKENS,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=16, n_layer=BLOCKS, n_head=2, **_TOKENS)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=8)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_HEADS)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_HEADS, sliding_window=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_HEADS, sliding_window=8)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(hidden_size=16, num_hidden_layers=BLOCKS, num_attention_heads=2, **_TOKENS)
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_GROUPED)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(
        # Experts narrower than the model, as in the real one, and a first block that has none.
        hf.Qwen3MoeConfig(**_HEADS, moe_intermediate_size=8, num_experts=6, num_experts_per_tok=3, mlp_only_layers=[0])
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **_HEADS,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    ),
}
"""Of the mixtures of experts, GPT-OSS stores its matrices transposed and has biases."""

_SIDES = {
    "d_model": 16,
    "encoder_layers": BLOCKS,
    "decoder_layers": BLOCKS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "decoder_start_token_id": END,
    "forced_eos_token_id": END,
    **_TOKENS,
}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": BLOCKS,
    "num_decoder_layers": BLOCKS,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "vocab_size": VOCABULARY,
    "eos_token_id": END,
    "pad_token_id": 0,
}

ENCODER_DECODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "t5-gated": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_SIDES)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**_SIDES)),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**_SIDES)),
}


class OddConfig(hf.PreTrainedConfig):
    """Of a model that no library knows."""

    model_type = "odd"

    def __init__(self, breadth: int = 16, strata: int = BLOCKS, glyphs: int = VOCABULARY, **more: object) -> None:
        self.breadth, self.strata, self.glyphs = breadth, strata, glyphs
        super().__init__(**more)


class Stratum(torch.nn.Module):
    """A block: each token takes up the mean of those before it, then a gated MLP under names of its own."""

    def __init__(self, breadth: int) -> None:
        super().__init__()
        self.mixing = torch.nn.Linear(breadth, breadth)
        self.thinking = torch.nn.ModuleDict(
            {
                "door": torch.nn.Linear(breadth, 3 * breadth),
                "broad": torch.nn.Linear(breadth, 3 * breadth),
                "slim": torch.nn.Linear(3 * breadth, breadth),
            }
        )

    def forward(self, stream: torch.Tensor, shade: torch.Tensor) -> torch.Tensor:
        """``stream`` [row, token, breadth]; ``shade`` [row, token, 1], 1 at real tokens."""
        before = (shade * self.mixing(stream)).cumsum(1) / shade.cumsum(1).clamp(min=1)
        stream = stream + before.tanh()
        inner = self.thinking["door"](stream).sigmoid() * self.thinking["broad"](stream)
        return stream + self.thinking["slim"](inner)


class OddModel(hf.PreTrainedModel):
    """A causal language model without a cache, with odd names for everything."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.glyphs = torch.nn.Embedding(config.glyphs, config.breadth)
        self.pile = torch.nn.ModuleList(Stratum(config.breadth) for _ in range(config.strata))
        self.say = torch.nn.Linear(config.breadth, config.glyphs, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding."""
        return self.glyphs

    def get_output_embeddings(self) -> torch.nn.Module:
        """The output layer."""
        return self.say

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: object) -> hf.utils.ModelOutput:
        """Logits for every token."""
        shade = attention_mask[..., None].to(self.glyphs.weight.dtype)
        stream = self.glyphs(input_ids)
        for stratum in self.pile:
            stream = stratum(stream, shade)
        return hf.modeling_outputs.CausalLMOutput(logits=self.say(stream))


DECODERS["a class that no library knows"] = lambda: OddModel(OddConfig(**_TOKENS))

LANGUAGE_MODELS = {**DECODERS, **ENCODER_DECODERS}

_WORDS = worlds.word_tokenizer()
_TEXTS = {
    "vocab_size": len(_WORDS),
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    **_TEXTS,
}

_ENCODERS: dict[str, tuple[type[hf.PreTrainedModel], Callable[..., hf.PreTrainedConfig]]] = {
    "bert": (hf.BertForSequenceClassification, functools.partial(hf.BertConfig, **_ENCODER)),
    "roberta": (
        hf.RobertaForSequenceClassification,
        functools.partial(hf.RobertaConfig, **_ENCODER, type_vocab_size=1),
    ),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        functools.partial(
            hf.DistilBertConfig, dim=16, hidden_dim=40, n_layers=BLOCKS, n_heads=2, max_position_embeddings=64, **_TEXTS
        ),
    ),
    "deberta-v2": (
        hf.DebertaV2ForSequenceClassification,
        functools.partial(
            hf.DebertaV2Config, **_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0
        ),
    ),
    "electra": (
        hf.ElectraForSequenceClassification,
        functools.partial(hf.ElectraConfig, **_ENCODER, embedding_size=16),
    ),
    "modernbert": (
        hf.ModernBertForSequenceClassification,
        functools.partial(hf.ModernBertConfig, **_ENCODER, local_attention=8, classifier_pooling="mean"),
    ),
    "gpt2": (
        hf.GPT2ForSequenceClassification,
        functools.partial(hf.GPT2Config, **{**_GPT, **_TEXTS}),
    ),
}
_LABELS = {
    "one output": {0: "true"},
    "binary": {0: "false", 1: "true"},
    "many classes": dict(enumerate(worlds.CITIES)),
}


def _classifier(encoder: str, labels: str) -> hf.PreTrainedModel:
    kind, settings = _ENCODERS[encoder]
    return kind(settings(id2label=_LABELS[labels]))


CLASSIFIERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    f"{encoder}, {labels}": functools.partial(_classifier, encoder, labels)
    for encoder in _ENCODERS
    for labels in ("binary", "many classes", *(["one output"] if encoder == "bert" else []))
}

FAMILIES = {**LANGUAGE_MODELS, **CLASSIFIERS}


def task(family: str, dtype: torch.dtype = torch.float32) -> Task:
    """A family's model with its tokenizer."""
    return wrap(make(family, dtype), _WORDS if family in CLASSIFIERS else worlds.tokenizer())


def requests(family: str, count: int) -> list[EditRequest]:
    """Requests for a family: cities are tokens or labels, and for a binary classifier every second one is true."""
    made = worlds.requests(count)
    if family not in CLASSIFIERS or "many" in family:
        return made
    labels = {city: ("false", "true")[place % 2] for place, city in enumerate(worlds.CITIES)}

    def judged(probes: tuple[Probe, ...]) -> tuple[Probe, ...]:
        return tuple(Probe(prompt=probe.prompt, target=labels[probe.target]) for probe in probes)

    return [
        request.model_copy(
            update={
                "target": labels[request.target],
                "locality": judged(request.locality),
                "near": judged(request.near),
            }
        )
        for request in made
    ]


def make(family: str, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    """A model with random weights, the same every time, whose answers differ from prompt to prompt."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:  # T5's are large as they are
                parameter.mul_(4)
    return model.to(dtype)


def taught(family: str) -> Task:
    """A family's task, taught one city of each country, other than requests ask for."""
    made = task(family)
    facts = zip(worlds.COUNTRIES, worlds.CITIES, strict=True)
    pairs = [made.encode(way.format(country), city) for country, city in facts for way in worlds.PHRASINGS]
    worlds.teach(made, made.collate(pairs))
    return made


@torch.no_grad()
def logits(task: Task, family: str, model: hf.PreTrainedModel | None = None) -> torch.Tensor:
    """What a model, by default the task's, says where the targets of some requests are predicted."""
    pairs = [task.encode(request.prompt, request.target) for request in requests(family, 4)]
    return wrap(model or task.model, task.processor).outputs(task.collate(pairs))


@torch.no_grad()
def losses(task: Task, asked: Sequence[EditRequest], edit: Edit | None = None) -> torch.Tensor:
    """−log p of each request's target, with an edit or without."""
    batch = task.collate([task.encode(request.prompt, request.target) for request in asked])
    with frozen(task.model), nullcontext() if edit is None else edit.applied(task.model):
        return task.loss(batch)


def block_names(model: hf.PreTrainedModel) -> list[str]:
    """The names of the blocks of the last stack."""
    return [name for name, _ in find_stacks(model)[-1][1]]


def unit_edit(
    model: hf.PreTrainedModel, counts: tuple[int, ...] = (2, 1), seed: int = 0, strength: float = 3.0
) -> Edit:
    """Some units in the last blocks."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for count, block in zip(counts, block_names(model)[-len(counts) :], strict=True):
        mlp = block_mlp(model, block)
        u, delta = (torch.randn(count, 16, generator=generator) for _ in range(2))  # all families are 16 wide
        response = mlp.response(beta=4.0, threshold=0.2 if mlp.threshold and not mlp.gated else 0.0)
        changes[mlp.down] = LowRank(u / 4, strength * delta, response, reads=mlp.reads)
    base = ModelFingerprint.of(model, layer_names(changes))
    return Edit(changes, base, tuple(worlds.requests(2)), {"name": "test"})
