"""Forms of English verbs: ``held`` is the past of ``hold``, of verbs that questions about facts have."""

from __future__ import annotations

_IRREGULAR = """
be was been; bear bore born; beat beat beaten; become became become; begin began begun; break broke broken;
bring brought brought; build built built; burn burnt burnt; buy bought bought; catch caught caught;
choose chose chosen; come came come; cost cost cost; cut cut cut; deal dealt dealt; die died died; do did done;
draw drew drawn; drink drank drunk; drive drove driven; eat ate eaten; fall fell fallen; feel felt felt;
fight fought fought; find found found; fly flew flown; forget forgot forgotten; get got got; give gave given;
go went gone; grow grew grown; have had had; hear heard heard; hit hit hit; hold held held; keep kept kept;
know knew known; lay laid laid; lead led led; leave left left; lend lent lent; let let let; lie lay lain;
lose lost lost; make made made; mean meant meant; meet met met; overcome overcame overcome; pay paid paid; put put put;
read read read; ride rode ridden; rise rose risen; run ran run; say said said; see saw seen; sell sold sold;
send sent sent; set set set; shoot shot shot; show showed shown; sing sang sung; sit sat sat; speak spoke spoken;
spend spent spent; stand stood stood; steal stole stolen; strike struck struck; swim swam swum; take took taken;
teach taught taught; tell told told; think thought thought; throw threw thrown; understand understood understood;
wear wore worn; win won won; write wrote written; rewrite rewrote rewritten; undergo underwent undergone
"""
_REGULAR = """
add affect adopt aid appear apply appoint assign associate assume attend award base belong border bury capture carry
cause charge classify coach collect complete compose conduct connect consider contain control convict create credit
decide defeat define deliver depict derive describe design destroy develop devise die direct discover dissolve
donate edit educate elect embed employ end engage enter establish exhibit face feature film finish follow form found
graduate head honor host house identify illustrate influence inhabit inherit inspire introduce invent involve
join kill launch license live locate love manage manufacture marry move murder name narrate nominate occupy occur offer
open operate order organize originate own paint participate perform place play power practice prepare present produce
program prosecute publish raise receive record refer relate release rename represent reside rule score serve sign
sponsor star start study succeed supply support surround tour trade train translate use visit voice work
"""
_FORMS = {lemma: (past, participle) for lemma, past, participle in map(str.split, _IRREGULAR.split(";"))}
_DOUBLED = {"star": "starr", "program": "programm", "embed": "embedd"}


def _regular_past(lemma: str) -> str:
    if lemma.endswith("e"):
        return f"{lemma}d"
    if lemma.endswith("y") and lemma[-2] not in "aeiou":
        return f"{lemma[:-1]}ied"
    return f"{_DOUBLED.get(lemma, lemma)}ed"


_FORMS |= {lemma: (_regular_past(lemma), _regular_past(lemma)) for lemma in _REGULAR.split()}
_LEMMAS = {form: lemma for lemma, forms in reversed(_FORMS.items()) for form in forms}


def past(lemma: str) -> str | None:
    """Return the past tense of a verb, ``wrote`` of ``write``; None of verbs that are not known."""
    return _FORMS[lemma][0] if lemma in _FORMS else None


def participle(lemma: str) -> str | None:
    """Return the past participle of a verb, ``written`` of ``write``; None of verbs that are not known."""
    return _FORMS[lemma][1] if lemma in _FORMS else None


def lemma_of(form: str) -> str | None:
    """Return the verb of which a word is the past tense or the participle; None of words that are none."""
    return _LEMMAS.get(form.casefold())
