"""The generation task of MEND's paper: passages of text that a model is to go on with in words of its own choice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.core.layers import execution_device
from remend.data.json_rows import Skip, ignore
from remend.data.parsing import request
from remend.data.text import read_text
from remend.errors import RequestError
from remend.request import EditRequest, Probe
from remend.tasks.causal_lm import CausalLM

TARGET_TOKENS = 10
"""The length of a target, as in the paper."""
PASSAGE_TOKENS = 100
"""The longest prefix that is asked; less where the model's context is shorter."""
SHORTEST = 16
"""A prompt has so many tokens at least; shorter passages are left out, as headings are."""
FAR, PARAPHRASES, SAMPLES = 4, 2, 8


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
    same beginning without up to half of its words; ``locality`` holds the beginnings of other passages with the
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
    passages = []
    for passage in read_text(text):
        if (parts := _parted(task, " ".join(passage.split()))) is None:
            skip(f"passages of fewer than {SHORTEST + TARGET_TOKENS} tokens")
        else:
            passages.append(parts)
    if len(passages) <= FAR:
        raise RequestError(
            f"{text} holds {len(passages)} passages of at least {SHORTEST + TARGET_TOKENS} tokens, and more than {FAR} "
            "are needed; blank lines separate passages"
        )
    chosen = random.Random(f"passages {seed}").sample(range(len(passages)), len(passages))
    yield from islice(_requests(task, passages, chosen if n is not None else sorted(chosen), seed, skip), n)


def _requests(
    task: CausalLM, passages: Sequence[tuple[str, str]], chosen: Sequence[int], seed: int, skip: Skip
) -> Iterator[EditRequest]:
    for number in chosen:
        draw = random.Random(f"passages {seed} {number}")
        prompt, truth = passages[number]
        target = _sampled(task, prompt, draw.randrange(2**31))
        if not target:
            skip("passages after which no sample began a word")
            continue
        words = prompt.split(" ")
        shorter = [" ".join(words[draw.randint(1, max(1, len(words) // 2)) :]) for _ in range(PARAPHRASES)]
        rest = [other for other in range(len(passages)) if other != number]
        far = (passages[other] for other in draw.sample(rest, FAR))
        yield request(
            prompt,
            target,
            [truth],
            subject=prompt,
            id=number,
            paraphrases=tuple(text for text in dict.fromkeys(shorter) if text.strip()),
            locality=tuple(Probe(prompt=asked, target=follows) for asked, follows in far),
        )


def _parted(task: CausalLM, text: str) -> tuple[str, str] | None:
    """The beginning of a passage and the ten tokens that follow it, the first of which begins a word; or None.

    Between a prompt and its target stands a space, so that no word may be cut in two.
    """
    room = (task.context or 10 * PASSAGE_TOKENS) - TARGET_TOKENS - 2
    ids = task.ids(text, framed=False)
    for cut in range(min(PASSAGE_TOKENS, room, len(ids) - TARGET_TOKENS), SHORTEST - 1, -1):
        before, follows = _words(task, ids[:cut]), _after(task, ids[:cut], ids[cut : cut + TARGET_TOKENS])
        if follows:
            return before, follows
    return None


def _words(task: CausalLM, ids: Sequence[int]) -> str:
    return task.decoded(list(ids), skip_special_tokens=True).strip()


def _after(task: CausalLM, ids: Sequence[int], more: Sequence[int]) -> str:
    """The text of ``more`` tokens after others, without half a letter at its end; empty if it goes on with a word."""
    before, whole = (task.decoded(list(part), skip_special_tokens=True) for part in (ids, [*ids, *more]))
    rest = whole.removeprefix(before).rstrip("\N{REPLACEMENT CHARACTER}")
    return rest.strip() if whole.startswith(before) and rest[:1].isspace() else ""


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def _sampled(task: CausalLM, prompt: str, seed: int) -> str:
    """Ten tokens after a prompt, drawn from the model's own distribution, as text; no draw outside is disturbed.

    Of several samples, the first is taken that begins a word; empty if none does.
    """
    device = execution_device(task.model)
    asked = task.ids(prompt)
    ids = torch.tensor([asked], device=device)
    with torch.no_grad(), _evaluating(task.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = task.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=SAMPLES,
            min_new_tokens=TARGET_TOKENS,
            max_new_tokens=TARGET_TOKENS,
            pad_token_id=task.tokenizer.eos_token_id,
        )
    texts = (_after(task, asked, row[len(asked) :]) for row in written.tolist())
    return next((text for text in texts if text), "")
