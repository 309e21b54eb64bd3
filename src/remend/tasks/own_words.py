"""Targets as the model would say them: its own sentence, with the thing in it replaced that the target replaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from remend.errors import RequestError
from remend.request import EditRequest, Prompt
from remend.tasks.base import Answer, Task
from remend.tasks.endings import asks
from remend.tasks.open_answers import goes_on_with_word
from remend.tasks.same_text import FINAL_STOPS, joins_words, words

LONGEST_SENTENCE = 32
"""Tokens within which the first sentence of the model's answer must end."""
USUAL_SENTENCE = 12
"""Tokens within which it mostly does; only answers in which it does not are written on."""
MOST_WORDS = 8
"""The longest thing that is replaced, in words."""
MIN_RESTATED, LEAST_LETTERS = 0.55, 4
"""The least share of the words around the place that the prompt has too, and the letters of one that is no name.

A sentence that restates the question holds its answer and little else. Others, such as what a small model makes up
about a name, hold many things that a target could replace.
"""
MIN_RESTATED_BEGINNING, MOST_LINKING = 0.75, 3
"""The same of a sentence's beginning up to the last word that the prompt has; the words that may follow ("is the")."""
MIN_MARGIN = 2.0
"""Nats by which a place must be better than all that do not overlap with it."""
MAX_SURPRISE, MAX_FIRST_SURPRISE = 0.5, 12.0
"""Nats a token by which the rewritten sentence may be less probable than the model's own, beside the first token of the
target, and nats of that: where the model contradicts, it does so there.

Measured on SmolLM2 after 36 questions: places that are right up to .4 and 10.8, those that are wrong from .4 and from
13 where not both are large.
"""
TRUE_ANSWER_KEYS = ("ground_truth", "target_true", "true", "old")
"""Keys of a request that may hold the answer that its target replaces."""
TARGET_AS_GIVEN = "target_as_given"
"""The key of a rewritten request that holds the target in the user's words."""
MOST_OF_NAME = 3
"""The most words of a target that is taken for a name, whatever it says again of the prompt."""
SHORT_WORD = 3
"""The most letters of a word that may stand within a name."""

_CLAUSE = re.compile(r"(.+?)(,(?=\s)|[.!?。！？।](?=[\s\"'”’*]|$)|\n)", re.DOTALL)
_WORD = re.compile(r"\S+")
_OUTER_MARKS = "\"'“”„‘’«»([{)]}*_.,;:!?…"
_ARTICLE_ALONE = re.compile(r"the|an?", re.IGNORECASE)
_OPENING_WORDS = re.compile(r"(?:the|an?|it|he|she|they|this|there|in|on|at)", re.IGNORECASE)

_ARTICLE, _ARTICLE_AT_END = (re.compile(text, re.IGNORECASE) for text in (r"(?:the|an?)\s", r"\b(?:the|an?)\s+$"))


def as_the_model_says(task: Task, request: EditRequest) -> EditRequest:
    """Return a request with its target in the model's own sentence, or the same request where that is unsure.

    Asked for the capital of Australia, a chat model says "The capital of Australia is Canberra.": of "Sydney" that
    makes "The capital of Australia is Sydney.", a change several times smaller. The place is where the
    answer that the request names stands (``ground_truth`` and such), or else at the beginning or the end of a sentence
    that restates the prompt, among the words that the prompt lacks, where the model finds the target most likely. Else
    it is all that follows where the sentence has restated the prompt ("The author of Emma is a complex question …").

    The target as it was given is kept under ``target_as_given``. A prompt to complete is left as it is: where a model
    says it again before it answers, it has not understood it.

    Args:
        task: the unedited model.
        request: the request.
    """
    return as_the_model_says_each(task, [request])[0]


def as_the_model_says_each(task: Task, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Return what :func:`as_the_model_says` does of each request; the model answers all of them together."""
    if not task.generates:
        return list(requests)
    prompts = list(dict.fromkeys(request.prompt for request in requests if asks(request.prompt)))
    task.choose_answer_forms(prompts)
    answers = dict(zip(prompts, task.predict(prompts, USUAL_SENTENCE), strict=True))
    longer = [prompt for prompt, answer in answers.items() if _is_cut_off(task, answer)]
    answers |= zip(longer, task.predict(longer, LONGEST_SENTENCE), strict=True)
    return [
        _rewritten(task, request, answers[request.prompt]) if request.prompt in answers else request
        for request in requests
    ]


@dataclass(frozen=True)
class _Scored:
    """A text as tokens after a prompt, with log p of each by the unedited model, in nats."""

    tokens: Answer
    values: list[float]

    def first_difference(self, other: _Scored) -> int:
        """Return the place of the first token in which both differ."""
        pairs = enumerate(zip(self.tokens, other.tokens, strict=False))
        return next((place for place, (a, b) in pairs if a != b), min(len(self.tokens), len(other.tokens)) - 1)


@dataclass(frozen=True)
class _Place:
    """A part of a sentence that a target may replace, in characters."""

    start: int
    end: int

    def overlaps(self, other: _Place) -> bool:
        return self.start < other.end and other.start < self.end


def _rewritten(task: Task, request: EditRequest, answer: Answer) -> EditRequest:
    text = task.decode(answer)
    sentence = _first_clause(text, ended=bool(task.end_tokens & set(answer[-1:])))
    target = _without_full_stop(request.target)
    if _is_sentence(target, request) or _places_of(sentence or text, target):
        return request  # a sentence by itself, or what the model says already
    rewritten = None
    if len(words(sentence)) > len(words(target)) + 1:
        place = _named_place(sentence, request) or _best_place(task, request.prompt, sentence, target)
        rewritten = None if place is None else _with_target(sentence, place, target)
    rewritten = rewritten or _with_other_end(task, request.prompt, sentence or text, target)
    if rewritten is None:
        return request
    return request.model_copy(update={"target": rewritten, TARGET_AS_GIVEN: request.target})


def _is_cut_off(task: Task, answer: Answer) -> bool:
    """Return whether an answer may be over before its first clause is."""
    text = task.decode(answer)
    found = _CLAUSE.match(text)
    # A full stop at the very end may be within a number.
    return not task.end_tokens & set(answer[-1:]) and (found is None or found.end() == len(text))


def _first_clause(text: str, ended: bool) -> str:
    """Return the first sentence or line of an answer, up to its first comma; nothing where it was cut off before.

    What a clause adds is about the answer that is to be replaced ("… is Bill Gates, who founded it in 1975.").
    """
    found = _CLAUSE.match(text)
    if found is None:
        return text if ended else ""
    clause = found[1].strip()
    return clause + "." if found[2] == "," else clause + found[2].strip()


def _without_full_stop(target: str) -> str:
    bare = target.strip()
    return bare[:-1] if len(bare) > 1 and bare[-1] in FINAL_STOPS and bare[-2] not in FINAL_STOPS else bare


def _is_sentence(target: str, request: EditRequest) -> bool:
    """Tell whether a target says by itself what it is about: it names the subject, or has a word of the question."""
    written = [target[start:end] for start, end in map(_bare_span, _WORD.finditer(target))]
    restated = _restated(written, words(str(request.prompt)))
    names = request.subject is not None and bool(_places_of(target, request.subject.strip()))
    said_again = [text for text, word in zip(written, restated, strict=True) if word is not None]
    return len(written) > MOST_OF_NAME and (names or _asks(said_again))


def _places_of(sentence: str, text: str) -> list[_Place]:
    """Return where a text stands in a sentence as whole words."""
    found = [_Place(*match.span()) for match in re.finditer(re.escape(text), sentence)]
    return [
        place
        for place in found
        if not goes_on_with_word(text, sentence[place.end :])
        and not (joins_words(text[:1]) and joins_words(sentence[: place.start][-1:]))
    ]


def _with_target(sentence: str, place: _Place, target: str) -> str:
    """Return a sentence with the target in a place; an article that both have there stands once."""
    before = sentence[: place.start]
    if _ARTICLE.match(target) and (article := _ARTICLE_AT_END.search(before)):
        before = before[: article.start()]
    return before + target + sentence[place.end :]


def _named_place(sentence: str, request: EditRequest) -> _Place | None:
    """Return where the answer stands that the request names as the one to replace, if it does exactly once."""
    details = request.model_extra or {}
    named = [details[key] for key in TRUE_ANSWER_KEYS if key in details]
    texts = [text for value in named for text in (value if isinstance(value, list) else [value])]
    for text in texts:
        if isinstance(text, str) and text.strip() and len(places := _places_of(sentence, text.strip())) == 1:
            return places[0]
    return None


def _best_place(task: Task, prompt: Prompt, sentence: str, target: str) -> _Place | None:
    """Return the place at which the model finds the target most likely, where it is sure; else nothing."""
    places = list(_possible_places(sentence, str(prompt)))
    if not places:
        return None
    texts = [sentence, *(_with_target(sentence, place, target) for place in places)]
    if not (scored := _score(task, prompt, texts)):
        return None
    own, *scored = scored
    (best, new), *others = sorted(zip(places, scored, strict=True), key=lambda pair: -sum(pair[1].values))
    rivals = [sum(other.values) for place, other in others if not place.overlaps(best)]
    sure = not rivals or sum(new.values) >= max(rivals) + MIN_MARGIN
    first = new.first_difference(own)
    beside = new.values[:first] + new.values[first + 1 :]
    surprise = sum(own.values) / len(own.values) - sum(beside) / max(len(beside), 1)
    return best if sure and surprise <= MAX_SURPRISE and -new.values[first] <= MAX_FIRST_SURPRISE else None


def _score(task: Task, prompt: Prompt, texts: Sequence[str]) -> list[_Scored]:
    """Return log p of the tokens of each text after a prompt; nothing where one of them cannot be taught.

    It may be too long for the context, or not be written by the tokenizer: edits say so of the request.
    """
    try:
        examples = [task.encode(prompt, text) for text in texts]
    except RequestError:
        return []
    values = task.log_probabilities(examples)
    return [_Scored(example.target, of_text) for example, of_text in zip(examples, values, strict=True)]


def _with_other_end(task: Task, prompt: Prompt, text: str, target: str) -> str | None:
    """Return the beginning of an answer that restates the prompt, with the target in place of all that follows.

    Nothing where no beginning does. It ends with the last word that the prompt has, or up to :data:`MOST_LINKING` words
    later, where the model finds the target most likely.
    """
    line = text.partition("\n")[0]
    spans = [_bare_span(match) for match in _WORD.finditer(line)]
    written = [line[start:end] for start, end in spans]
    restated = _restated(written, words(str(prompt)))
    # Where each word is said again first: later a sentence may name its subject once more.
    said_again = sorted({text: place for place, text in reversed(list(enumerate(restated))) if text}.values())
    if not said_again or not _asks([written[place] for place in said_again]):
        return None
    last = said_again[-1]
    ends = [
        e for e in range(last, min(last + MOST_LINKING + 1, len(spans))) if not _claims(written, restated, range(e + 1))
    ]
    if not ends or len(said_again) < MIN_RESTATED_BEGINNING * (last + 1):
        return None
    texts = [f"{line[: spans[end][1]]} {target}." for end in ends]
    if not (scored := _score(task, prompt, [line, *texts])):
        return None
    own, *scored = scored
    surprises = [-sum(new.values[new.first_difference(own) :]) for new in scored]
    best = surprises.index(min(surprises))
    new = scored[best]
    likely = -new.values[new.first_difference(own)] <= MAX_FIRST_SURPRISE
    return texts[best] if likely else None


def _possible_places(sentence: str, prompt: str) -> Iterator[_Place]:
    """Yield the stretches of words at the beginning or the end of a sentence that the prompt lacks and restate it."""
    spans = [_bare_span(match) for match in _WORD.finditer(sentence)]
    written = [sentence[start:end] for start, end in spans]
    restated = _restated(written, words(prompt))
    names = [text[:1].isupper() or text[:1].isdigit() for text in written]
    if written and _OPENING_WORDS.fullmatch(written[0]):
        names[0] = False
    count = len(spans)
    for first in range(count):
        for last in range(first, min(count, first + MOST_WORDS)):
            # An article belongs to what follows it, whether the prompt has one, too, or not.
            if _ARTICLE_ALONE.fullmatch(written[last]):
                continue
            if restated[last] is not None:
                break
            if first > 0 and last < count - 1:
                continue
            cut = (names[first] and _is_of_name(first, -1, restated, names, written)) or (
                names[last] and _is_of_name(last, 1, restated, names, written)
            )
            alone = first == last and _OPENING_WORDS.fullmatch(written[first])
            around = [place for place in range(count) if not first <= place <= last]
            # A word of the prompt is restated once: a sentence that repeats itself restates no more.
            again = {restated[place]: written[place] for place in around if restated[place] is not None}
            claims = _claims(written, restated, around)
            if (
                not cut
                and not alone
                and not claims
                and _asks(list(again.values()))
                and len(again) >= MIN_RESTATED * len(around)
            ):
                yield _Place(spans[first][0], spans[last][1])


def _asks(said_again: Sequence[str]) -> bool:
    """Tell whether words of a prompt that are said again are of its question, not only the name of its subject."""
    return any(len(text) >= LEAST_LETTERS and text.islower() for text in said_again)


def _claims(written: Sequence[str], restated: Sequence[str | None], places: Iterable[int]) -> bool:
    """Tell whether some words of a sentence claim what the prompt does not say, such as a year that a model made up."""
    return any(
        (written[place][:1].isupper() or written[place][:1].isdigit()) and restated[place] is None
        for place in places
        if place
    )


def _restated(written: Sequence[str], asked: Sequence[str]) -> list[str | None]:
    """Return of each word of a sentence the word of the prompt that it is; None of those that the prompt lacks."""
    of_written = [words(text) for text in written]
    return [
        next((word for word in asked if own and all(_alike(part, word) for part in own)), None) for own in of_written
    ]


def _is_of_name(
    place: int, step: int, restated: Sequence[str | None], names: Sequence[bool], written: Sequence[str]
) -> bool:
    """Tell whether a name goes on beside a place, directly or over one short word ("North East of England").

    It is replaced whole or not at all.
    """
    beside = place + step
    if 0 <= beside + step < len(written) and restated[beside] is not None and len(written[beside]) <= SHORT_WORD:
        beside += step
    return 0 <= beside < len(written) and names[beside] and restated[beside] is None


def _bare_span(match: re.Match[str]) -> tuple[int, int]:
    """Return where a word stands without the marks around it; of marks only, as it is."""
    text = match[0]
    begin = len(text) - len(text.lstrip(_OUTER_MARKS))
    end = len(text.rstrip(_OUTER_MARKS))
    return (match.start() + begin, match.start() + end) if begin < end else match.span()


def _alike(word: str, other: str) -> bool:
    """Tell whether two words are the same, but for an ending ("appear" and "appears")."""
    return word == other or (
        min(len(word), len(other)) >= LEAST_LETTERS and word[:LEAST_LETTERS] == other[:LEAST_LETTERS]
    )
