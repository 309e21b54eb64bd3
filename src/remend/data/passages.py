"""The text generation task of MEND's paper: continue a passage of text as the unedited model once sampled it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel

from remend.core.layers import execution_device
from remend.data.json_rows import Skip, ignore
from remend.data.parsing import make_request
from remend.data.text_files import read_text
from remend.errors import RequestError
from remend.request import EditRequest, Probe
from remend.tasks import Task
from remend.tasks.causal_lm import CausalLM

TARGET_TOKENS = 10
"""The length of a target, as in the paper."""
PROMPT_TOKENS = 100
"""The largest length of a prompt; less where the model's context is shorter."""
MIN_PROMPT_TOKENS = 16
"""The smallest length of a prompt; shorter passages, such as headings, are left out."""
LOCALITY_PROBES = 4
PARAPHRASES = 2
SAMPLES = 8
"""The number of continuations sampled for a target, of which the first that begins a word is taken."""


def generation_requests(
    task: Task,
    text: str | Path,
    n: int | None = None,
    seed: int = 0,
    skip: Skip = ignore,
) -> Iterator[EditRequest]:
    """Yield requests to continue passages of a plain text as the model itself once did, sampled at temperature 1.

    The prompt is the beginning of a passage, the target a sampled continuation of ten tokens. Its paraphrases are the
    same beginning without up to half of its words; ``locality`` holds the beginnings of other passages with the
    ten tokens that really follow there, of which a model knows few: its likely answers must stay, not these. The
    subject is the passage, so that no split shares one; ``ground_truth`` is what really follows.

    Args:
        task: a causal language model, which samples the targets.
        text: a file of passages that blank lines separate.
        n: the number of requests, of passages drawn with the seed; by default all, in the order of the text.
        seed: for passages, cuts and samples.
        skip: called with the reason for each passage that is left out.

    Raises:
        RequestError: the text cannot be read, or holds too few passages that are long enough.
        ModelError: the model is no language model.
    """
    task = CausalLM(task.model, task.processor)
    # All passages are cut before the first request, since locality probes are drawn from all of them.
    passages = []
    for passage in read_text(text):
        if (parts := _split_passage(task, " ".join(passage.split()))) is None:
            skip(f"passages of fewer than {MIN_PROMPT_TOKENS + TARGET_TOKENS} tokens")
        else:
            passages.append(parts)
    if len(passages) <= LOCALITY_PROBES:
        raise RequestError(
            f"{text} holds {len(passages)} passages of at least {MIN_PROMPT_TOKENS + TARGET_TOKENS} tokens, and more "
            f"than {LOCALITY_PROBES} are needed; blank lines separate passages"
        )
    order = random.Random(f"passages {seed}").sample(range(len(passages)), len(passages))
    yield from islice(_requests(task, passages, order if n is not None else sorted(order), seed, skip), n)


def _requests(
    task: CausalLM, passages: Sequence[tuple[str, str]], order: Sequence[int], seed: int, skip: Skip
) -> Iterator[EditRequest]:
    for number in order:
        # A generator for each passage, so that a request is the same however many are made.
        rng = random.Random(f"passages {seed} {number}")
        prompt, truth = passages[number]
        target = _sample_target(task, prompt, rng.randrange(2**31))
        if not target:
            skip("passages after which no sample began a word")
            continue
        words = prompt.split(" ")
        suffixes = [" ".join(words[rng.randint(1, max(1, len(words) // 2)) :]) for _ in range(PARAPHRASES)]
        others = [index for index in range(len(passages)) if index != number]
        locality = (passages[index] for index in rng.sample(others, LOCALITY_PROBES))
        yield make_request(
            prompt,
            target,
            [truth],
            subject=prompt,
            id=number,
            paraphrases=tuple(suffix for suffix in dict.fromkeys(suffixes) if suffix.strip()),
            locality=tuple(Probe(prompt=beginning, target=following) for beginning, following in locality),
        )


def _split_passage(task: CausalLM, text: str) -> tuple[str, str] | None:
    """Return the beginning of a passage and the ten tokens that follow it, the first of which begins a word; or None.

    A space separates a prompt from its target, so that no word may be cut in two.
    """
    # Two tokens are left for the begin and end tokens that a tokenizer may put around the prompt.
    longest = (task.context or 10 * PROMPT_TOKENS) - TARGET_TOKENS - 2
    ids = task.ids(text, framed=False)
    # From the longest prompt down, until a cut falls between two words.
    for cut in range(min(PROMPT_TOKENS, longest, len(ids) - TARGET_TOKENS), MIN_PROMPT_TOKENS - 1, -1):
        prompt = task.decode_tokens(ids[:cut], skip_special_tokens=True).strip()
        following = _decode_continuation(task, ids[:cut], ids[cut : cut + TARGET_TOKENS])
        if following:
            return prompt, following
    return None


def _decode_continuation(task: CausalLM, ids: Sequence[int], continuation: Sequence[int]) -> str:
    """Return the text of ``continuation`` after ``ids``; empty if it continues a word."""
    # Decoded together and then taken apart, since many tokenizers decode the beginning of a text without its space.
    before = task.decode_tokens(list(ids), skip_special_tokens=True)
    whole = task.decode_tokens([*ids, *continuation], skip_special_tokens=True)
    # A character of several bytes may be cut at the end.
    text = whole.removeprefix(before).rstrip("\N{REPLACEMENT CHARACTER}")
    return text.strip() if whole.startswith(before) and text[:1].isspace() else ""


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _sample_target(task: CausalLM, prompt: str, seed: int) -> str:
    """Return ten tokens after a prompt, sampled from the model, as text; empty if no sample begins a word.

    The random state outside is left as it was.
    """
    device = execution_device(task.model)
    prompt_ids = task.ids(prompt)
    ids = torch.tensor([prompt_ids], device=device)
    with (
        torch.no_grad(),
        _evaluation_mode(task.model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        samples = task.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=SAMPLES,
            min_new_tokens=TARGET_TOKENS,
            max_new_tokens=TARGET_TOKENS,
            pad_token_id=task.processor.eos_token_id,
        )
    texts = (_decode_continuation(task, prompt_ids, sample[len(prompt_ids) :]) for sample in samples.tolist())
    return next((text for text in texts if text), "")
