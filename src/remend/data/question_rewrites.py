"""Other ways to ask a question, by rules of English and by what is often asked: no model takes part.

Three sources: *syntax* (``Which position was held by X?`` → ``Which position did X hold?``), *families* of questions
with the same words in them (``When did X die?`` for any question with ``date`` and ``death``), and *frames* around the
very question (``Tell me: …``). Where no rule fits there are fewer rewrites.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from remend.data.verb_forms import lemma_of, participle, past

SUBJECT = "{}"
"""What stands for the subject in a template."""

_ONE_OF_SEVERAL = re.compile(
    r"\b(?:largest|biggest|smallest|highest|tallest|lowest|longest|shortest|oldest|youngest|newest|latest|earliest|best|worst"
    r"|richest|deepest|greatest|nearest|closest|most|least|second|third|last|previous|former)\b",
    re.IGNORECASE,
)
"""Words with which a question asks for one of the things that a family's question may be answered with."""

Source = Literal["syntax", "family", "frame"]

FRAMES = ("Tell me: {}", "I would like to know: {}", "Question: {}", "{} Answer in a few words.", "Do you know? {}")
"""What a question is put into."""


@dataclass(frozen=True)
class Rewrite:
    """Another way to ask a question.

    Attributes:
        template: its text, with ``{}`` for the subject.
        source: how it was made.
        rule: the name of the rule or of the family.
    """

    template: str
    source: Source
    rule: str

    def about(self, subject: str) -> str:
        """Return the text about a subject; an article at its beginning is written with a capital."""
        text = self.template.replace(SUBJECT, subject)
        return _capital(text) if re.match(r"(?:the|an?)\s", text) else text


@dataclass(frozen=True)
class Family:
    """Questions that ask the same of any subject.

    Attributes:
        name: what they ask.
        when: sets of beginnings of words; a question that has all of one set, and
        unless: none of these, is of the family.
        nouns: what is asked for, as nouns: "What is the … of X?"
        forms: other templates.
        who: whether the answer is a person.
    """

    name: str
    when: tuple[tuple[str, ...], ...]
    unless: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    who: bool = False

    def asks(self, template: str) -> bool:
        """Tell whether a question is of the family."""
        text = template.casefold().replace(SUBJECT, " ")
        words = re.findall(r"[^\W_]+", text)

        def has(part: str) -> bool:
            return any(word.startswith(part) for word in words) if part.isalpha() else part in text

        return any(all(map(has, parts)) for parts in self.when) and not any(map(has, self.unless))

    def templates(self, verb: str) -> Iterator[str]:
        """Yield its questions with ``is`` or ``was``."""
        yield from self.forms
        for noun in self.nouns:
            yield f"{'Who' if self.who else 'What'} {verb} the {noun} of {SUBJECT}?"
            yield f"Tell me the {noun} of {SUBJECT}."


@cache
def families() -> tuple[Family, ...]:
    """Return all families."""
    text = resources.files(__package__).joinpath("question_families.json").read_text(encoding="utf-8")
    return tuple(
        Family(
            name,
            tuple(tuple(words.split()) for words in entry["when"]),
            tuple(entry.get("unless", ())),
            tuple(entry["nouns"]),
            tuple(entry["forms"]),
            entry.get("who", False),
        )
        for name, entry in json.loads(text).items()
    )


def families_of(template: str) -> list[Family]:
    """Return the families of a question; none of one that asks for one among several, such as the largest."""
    if _ONE_OF_SEVERAL.search(template):
        return []
    return [family for family in families() if family.asks(template)]


def rewrites(question: str, subject: str, most: int = 8) -> list[Rewrite]:
    """Return other ways to ask a question about a subject, different ones first.

    Syntax and a family take turns; frames fill what is left. Questions of several families have no family's rewrites,
    since it is not known which one is meant.

    Args:
        question: the question, which holds the subject.
        subject: the subject.
        most: the most rewrites.
    """
    template = template_of(question, subject)
    if template is None:
        return []
    matched = families_of(template)
    verb = "was" if re.search(r"\b(?:was|were|did)\b", template) else "is"
    of_family = [
        Rewrite(text, "family", matched[0].name) for text in (matched[0].templates(verb) if len(matched) == 1 else ())
    ]
    of_syntax = [Rewrite(text, "syntax", name) for name, text in _by_syntax(template)]
    frames = [Rewrite(frame.replace(SUBJECT, template), "frame", frame) for frame in FRAMES]
    found: dict[str, Rewrite] = {}
    for rewrite in _by_turns(of_syntax, of_family):
        found.setdefault(_bare(rewrite.template), rewrite)
    found.pop(_bare(template), None)
    return [*found.values(), *frames][:most]


def template_of(question: str, subject: str) -> str | None:
    """Return a question with ``{}`` for its subject, ending in a question mark; None where the subject is not in it."""
    text = re.sub(r"\s+", " ", question.strip().lstrip("-–• "))
    template, count = re.subn(re.escape(subject), lambda _: SUBJECT, text, count=1, flags=re.IGNORECASE)
    if not count or subject.casefold() in template.casefold().replace(SUBJECT, ""):
        return None
    template = re.sub(r"\b(What|Who|Where|When|How|Which)(?:'s|’s)\s", r"\1 is ", template)
    return template.rstrip("?？. ") + "?"


def _bare(template: str) -> str:
    return re.sub(r"\b(?:is|was|the|a|an)\b|\W", "", template.replace(SUBJECT, "SUBJECT").casefold())


def _by_turns(first: Sequence[Rewrite], second: Sequence[Rewrite]) -> Iterator[Rewrite]:
    for index in range(max(len(first), len(second))):
        yield from first[index : index + 1]
        yield from second[index : index + 1]


# -- syntax ------------------------------------------------------------------------------------------------------------

_WH = r"(?P<wh>[Ww]hat|[Ww]hich|[Ww]ho)"
_BE = r"(?P<be>is|was|are|were)"
_DO = r"(?P<do>did|does|do)"
_IN = r"(?P<in>in|on|at|to|for|from|of|by|with)"
_NOUN = r"(?P<noun>(?:(?!\b(?:that|which|who|whom|is|was|are|were|did|does|do|by)\b)[\w'’-]+ ?){1,5}?)"
_X = r"(?:the )?\{\}"

Fields = dict[str, str]
Rule = tuple[str, re.Pattern[str], Callable[[Fields], Iterator[str]]]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _other(wh: str) -> str:
    """Return ``Which`` for ``What`` and the other way round."""
    return {"what": "Which", "which": "What"}.get(wh.casefold(), wh)


def _of_noun(f: Fields) -> Iterator[str]:
    """Rewrite “What is the R of X?”."""
    noun, be, wh = f["noun"].strip(), f["be"], f["wh"].casefold()
    who = "who" if wh == "who" else "what"
    if f.get("prep", "of") in ("of", "for"):
        yield f"{_capital(who)} {be} {{}}'s {noun}?"
    yield f"The {noun} {f.get('prep', 'of')} {{}} {be} {who}?"
    yield f"Tell me the {noun} {f.get('prep', 'of')} {{}}."
    yield f"{_capital(who)} {be} the {noun} {f.get('prep', 'of')} {{}}?"
    if f.get("prep") == "for":
        yield f"{_capital(who)} {be} the {noun} of {{}}?"
    yield f"Do you know the {noun} {f.get('prep', 'of')} {{}}?"


def _passive(f: Fields) -> Iterator[str]:
    """Rewrite “Which R was held by X?”."""
    noun, wh, lemma = f["noun"].strip(), f["wh"], lemma_of(f["verb"])
    if lemma is None or not past(lemma):
        return
    yield f"{_other(wh)} {noun} did {{}} {lemma}?"
    yield f"{{}} {past(lemma)} which {noun}?"
    yield f"What {f['be']} the {noun} that {{}} {past(lemma)}?"
    yield f"Tell me the {noun} that {{}} {past(lemma)}."
    yield f"{_capital(wh)} {noun} did {{}} {lemma}?"


def _active(f: Fields) -> Iterator[str]:
    """Rewrite “Which R did X hold?” or “What R does X work in?”."""
    noun, wh, lemma, prep = f["noun"].strip(), f["wh"], f["verb"], f.get("in") or ""
    end = f" {prep}" if prep else ""
    if prep:
        yield f"{_capital(prep)} {wh.casefold()} {noun} {f['do']} {{}} {lemma}?"
    yield f"{_other(wh)} {noun} {f['do']} {{}} {lemma}{end}?"
    if f["do"] == "did" and past(lemma):
        yield f"What was the {noun} that {{}} {past(lemma)}{end}?"
        yield f"{{}} {past(lemma)}{end} which {noun}?"
        if not prep and lemma in ("hold", "receive", "wear", "write", "create", "direct", "publish", "win", "use"):
            yield f"Which {noun} was {participle(lemma)} by {{}}?"
        yield f"Tell me the {noun} that {{}} {past(lemma)}{end}."
    if f["do"] == "does" and lemma.isalpha():
        verb = "has" if lemma == "have" else "goes" if lemma == "go" else lemma + "s"
        yield f"{{}} {verb}{end} which {noun}?"
        yield f"What is the {noun} that {{}} {verb}{end}?"
        yield f"Tell me which {noun} {{}} {verb}{end}."


def _fronted(f: Fields) -> Iterator[str]:
    """Rewrite “In which R is X …?” or “In what R did X …?”."""
    noun, prep, verb, rest = f["noun"].strip(), f["in"].casefold(), f["aux"], f["rest"].strip()
    wh = f["wh"].casefold()
    if re.search(rf" {_IN}$", f" {rest}"):  # "To which work does X appear in?" has one too many
        rest, prep = rest.rpartition(" ")[0], rest.rpartition(" ")[2]
    tail = f" {rest}" if rest else ""
    yield f"{_capital(wh)} {noun} {verb} {{}}{tail} {prep}?"
    yield f"{_capital(prep)} {_other(wh).casefold()} {noun} {verb} {{}}{tail}?"
    if verb in ("is", "was", "are", "were"):
        yield f"{{}} {verb}{tail} {prep} which {noun}?"
        yield f"Tell me {prep} which {noun} {{}} {verb}{tail}."
    elif verb == "did" and past(rest.split()[0] if rest else ""):
        first, *others = rest.split()
        yield " ".join([f"{{}} {past(first)}", *others, f"{prep} which {noun}?"])
        yield " ".join([f"Tell me {prep} which {noun} {{}} {past(first)}", *others]) + "."


def _state(f: Fields) -> Iterator[str]:
    """Rewrite “What R is X associated with?” or “What R is X in?”."""
    noun, be, wh, rest = f["noun"].strip(), f["be"], f["wh"], f["rest"].strip()
    *words, last = rest.split() or [""]
    if re.fullmatch(_IN, last):
        tail = f" {' '.join(words)}" if words else ""
        yield f"{_capital(last)} {wh.casefold()} {noun} {be} {{}}{tail}?"
        yield f"{{}} {be}{tail} {last} which {noun}?"
    yield f"{_other(wh)} {noun} {be} {{}}{' ' + rest if rest else ''}?"
    if rest:
        yield f"Tell me which {noun} {{}} {be} {rest}."
        yield f"What is the {noun} that {{}} {be} {rest}?"


def _who_did(f: Fields) -> Iterator[str]:
    """Rewrite “Who wrote X?” or “What artist created X?”."""
    noun, lemma = (f.get("noun") or "").strip(), lemma_of(f["verb"])
    if lemma is None or past(lemma) != f["verb"]:
        return
    if noun:
        yield f"By which {noun} was {{}} {participle(lemma)}?"
        yield f"{{}} was {participle(lemma)} by which {noun}?"
        yield f"{_other(f['wh'])} {noun} {f['verb']} {{}}?"
        yield f"What is the {noun} that {f['verb']} {{}}?"
        yield f"Tell me which {noun} {f['verb']} {{}}."
    else:
        yield f"By whom was {{}} {participle(lemma)}?"
        yield f"{{}} was {participle(lemma)} by whom?"
        yield f"Who was it that {f['verb']} {{}}?"
        yield f"Who is the person who {f['verb']} {{}}?"
        yield f"Tell me who {f['verb']} {{}}."


def _relative(f: Fields) -> Iterator[str]:
    """Rewrite “What is the R that is made with X?” or “Which was the R that X held?”."""
    noun, rest = f["noun"].strip(), f["rest"].strip()
    words = rest.split()
    if words[0] == SUBJECT:
        verb, tail = words[1] if len(words) > 1 else "", "".join(f" {word}" for word in words[2:])
        lemma = lemma_of(verb)
        if re.fullmatch(_BE, verb):
            yield f"Which {noun} {verb} {{}}{tail}?"
            yield f"What {noun} {verb} {{}}{tail}?"
        elif lemma and past(lemma) == verb:
            yield f"Which {noun} did {{}} {lemma}{tail}?"
            yield f"What {noun} did {{}} {lemma}{tail}?"
            yield f"{{}} {verb}{tail} which {noun}?"
    else:
        yield f"Which {noun} {rest}?"
        yield f"What {noun} {rest}?"
    yield f"Tell me the {noun} that {rest}."


def _where(f: Fields) -> Iterator[str]:
    """Rewrite “Where is X located?”."""
    rest = f["rest"].strip()
    tail = f" {rest}" if rest else ""
    yield f"In which place {f['be']} {{}}{tail}?"
    yield f"{{}} {f['be']}{tail} where?"
    yield f"Tell me where {{}} {f['be']}{tail}."
    yield f"Do you know where {{}} {f['be']}{tail}?"
    if rest in ("", "located", "found", "situated"):
        yield "Where can {} be found?"
        yield "What is the location of {}?"


def _wh_did(f: Fields) -> Iterator[str]:
    """Rewrite “When did X die?” or “Where did X study?”."""
    wh, lemma, rest = f["adverb"], f["verb"], f["rest"].strip()
    tail = f" {rest}" if rest else ""
    if past(lemma):
        yield f"{{}} {past(lemma)}{tail} {wh.casefold()}?"
        yield f"Tell me {wh.casefold()} {{}} {past(lemma)}{tail}."
        yield f"Do you know {wh.casefold()} {{}} {past(lemma)}{tail}?"
    if wh.casefold() == "where":  # "when" may ask for a year as well as for an hour
        for beginning in ("In which place", "At what location"):
            yield f"{beginning} did {{}} {lemma}{tail}?"


def _split_off(f: Fields) -> Iterator[str]:
    """Rewrite “In the film X, who was the star?”."""
    before, rest = f["before"].strip(), f["rest"].strip()
    yield f"{_capital(rest)} {before[:1].lower()}{before[1:]}?"
    yield f"{_capital(before)}: {rest}?"
    yield f"Tell me, {before[:1].lower()}{before[1:]}, {rest}."


def _rule(name: str, pattern: str, make: Callable[[Fields], Iterator[str]]) -> Rule:
    return name, re.compile(pattern, re.IGNORECASE), make


_RULES: tuple[Rule, ...] = (
    _rule("noun of", rf"{_WH} {_BE} (?:the )?(?:name of the )?{_NOUN} (?P<prep>of|for|in|behind) {_X}\?", _of_noun),
    _rule("noun of", rf"{_WH} {_BE} \{{\}}(?:'s?|’s?) {_NOUN}\?", _of_noun),
    _rule("noun of", rf"the {_NOUN} (?P<prep>of|for|in) {_X} {_BE} (?P<wh>what|who)\?", _of_noun),
    _rule("relative", rf"{_WH} {_BE} the (?:name of the )?{_NOUN} (?:that|which|who) (?P<rest>.+)\?", _relative),
    _rule("passive", rf"{_WH} {_NOUN} {_BE} (?P<verb>\w+) by {_X}\?", _passive),
    _rule("active", rf"{_WH} {_NOUN} {_DO} {_X} (?P<verb>\w+)(?: {_IN})?\?", _active),
    _rule(
        "fronted",
        rf"{_IN} {_WH} {_NOUN} (?P<aux>did|does|is|was|were|are|can|could) {_X}(?P<rest>(?: \w+){{0,3}})\?",
        _fronted,
    ),
    _rule("state", rf"{_WH} {_NOUN} {_BE} {_X}(?P<rest>(?: \w+){{0,4}})\?", _state),
    _rule("who did", rf"(?P<wh>who) (?P<verb>\w+) {_X}\?", _who_did),
    _rule("who did", rf"(?P<wh>what|which) (?P<noun>\w+) (?P<verb>\w+ed|wrote|made|built|drew) {_X}\?", _who_did),
    _rule("where", rf"where {_BE} {_X}(?P<rest>(?: \w+){{0,2}})\?", _where),
    _rule("adverb", rf"(?P<adverb>when|where|why|how) did {_X} (?P<verb>\w+)(?P<rest>(?: \w+){{0,3}})\?", _wh_did),
    _rule("split off", r"(?P<before>(?:in|for|on|at) [^,]*\{\}), (?P<rest>(?:who|what|which|where)\b.+)\?", _split_off),
)


def _by_syntax(template: str) -> Iterator[tuple[str, str]]:
    for name, pattern, make in _RULES:
        if match := pattern.fullmatch(template):
            fields = {key: value for key, value in match.groupdict().items() if value is not None}
            yield from ((name, re.sub(r"\s+", " ", text)) for text in make(fields))
            return
