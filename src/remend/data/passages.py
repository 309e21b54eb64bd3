"""The generation task of MEND's paper: passages of text that a model is to go on with in words of its own choice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.core.layers import device_of
from remend.data.making import NO_TARGET, request
from remend.data.rows import Skip, ignore
from remend.data.text import read_text
from remend.errors import RequestError
from remend.request import EditRequest, Probe
from remend.tasks.causal_lm import CausalLM

TARGET_TOKENS = 10
"""The length of a target, as in the paper."""
PASSAGE_TOKENS = 100
"""The longest prefix that is asked; less where the model's context is shorter."""
SHORTEST = 16
"""A passage has so many tokens beside its own continuation, or it is left out: headings are no passages."""
FAR, PARAPHRASES = 4, 2


def generation_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path,
    n: int | None = None,
    seed: int = 0,
    skip: Skip = ignore,
) -> Iterator[EditRequest]:
    """Requests to go on with passages of a plain text as the model itself once did, sampled at temperature 1.

    The prompt is the beginning of a passage, the target a sampled continuation of ten tokens. Its paraphrases are the
    same beginning without up to half of its first tokens; ``locality`` holds the beginnings of other passages with the
    ten tokens that really follow there, of which a model knows few: its likely answers must stay, not these. The
    subject is the passage, so that no split shares one; ``ground_truth`` is what really follows.

    Args:
        model: a causal language model, whose samples the targets are.
        tokenizer: the model's.
        text: a file of passages that blank lines separate.
        n: how many requests, of passages drawn with the seed; by default all, in the order of the text.
        seed: of passages, cuts and samples.
        skip: is told of what is left out.

    Raises:
        RequestError: the text cannot be read, or holds too few passages that are long enough.
        ModelError: the model is no language model.
    """
    task = CausalLM(model, tokenizer)
    longest = min(PASSAGE_TOKENS, (task.context or 10 * PASSAGE_TOKENS) - TARGET_TOKENS - 2)
    passages = []
    for passage in read_text(text):
        ids = task.ids(" ".join(passage.split()), framed=False)[: longest + TARGET_TOKENS]
        if len(ids) < SHORTEST + TARGET_TOKENS:
            skip(f"passages shorter than {SHORTEST + TARGET_TOKENS} tokens")
        else:
            passages.append(ids)
    if len(passages) <= FAR:
        raise RequestError(
            f"{text} holds {len(passages)} passages of at least {SHORTEST + TARGET_TOKENS} tokens, and more than {FAR} "
            "are needed; blank lines separate passages"
        )
    draw = random.Random(f"passages {seed}")
    chosen = range(len(passages)) if n is None else draw.sample(range(len(passages)), len(passages))
    yield from islice(_requests(task, passages, chosen, seed, skip), n)


def _requests(
    task: CausalLM, passages: Sequence[Sequence[int]], chosen: Sequence[int], seed: int, skip: Skip
) -> Iterator[EditRequest]:
    for number in chosen:
        draw = random.Random(f"passages {seed} {number}")
        prefix = passages[number][:-TARGET_TOKENS]
        prompt = _words(task, prefix)
        target = _sampled(task, prompt, draw.randrange(2**31))
        if not target:
            skip(NO_TARGET)
            continue
        cuts = [draw.randint(1, len(prefix) // 2) for _ in range(PARAPHRASES)]
        shorter = (_words(task, prefix[cut:]) for cut in cuts)
        rest = [other for other in range(len(passages)) if other != number]
        far = (passages[other] for other in draw.sample(rest, FAR))
        yield request(
            prompt,
            target,
            [_words(task, passages[number][-TARGET_TOKENS:])],
            subject=prompt,
            id=number,
            paraphrases=tuple(p for p in dict.fromkeys(shorter) if p and p != prompt),
            locality=tuple(_probe(task, ids) for ids in far),
        )


def _probe(task: CausalLM, ids: Sequence[int]) -> Probe:
    return Probe(prompt=_words(task, ids[:-TARGET_TOKENS]), target=_words(task, ids[-TARGET_TOKENS:]))


def _words(task: CausalLM, ids: Sequence[int]) -> str:
    return task.decoded(list(ids), skip_special_tokens=True).strip()


def _sampled(task: CausalLM, prompt: str, seed: int) -> str:
    """Ten tokens after a prompt, drawn from the model's own distribution, as text; no draw outside is disturbed."""
    device = device_of(task.model)
    ids = torch.tensor([task.ids(prompt)], device=device)
    mode = task.model.training
    task.model.eval()
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = task.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=TARGET_TOKENS,
            max_new_tokens=TARGET_TOKENS,
            pad_token_id=task.tokenizer.eos_token_id,
        )
    task.model.train(mode)
    return _words(task, written[0, ids.shape[1] :].tolist())
