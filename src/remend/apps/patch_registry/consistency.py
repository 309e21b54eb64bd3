"""Check that the records of a patch registry agree with each other: what is recorded twice, and what follows what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from remend.apps.patch_registry.database import (
    ACTIVE,
    DRAFT,
    EVENT_ACTIVATED,
    EVENT_ADDED,
    EVENT_REVERTED,
    REVERTED,
    PatchEntry,
    PatchEvent,
)

AT_MOST = ("perplexity", "size")
"""The checks whose bound is the largest allowed value; that of the others is the smallest."""

_STATE_AFTER = {EVENT_ADDED: DRAFT, EVENT_ACTIVATED: ACTIVE, EVENT_REVERTED: REVERTED}
_STATES_BEFORE = {EVENT_ADDED: (None,), EVENT_ACTIVATED: (DRAFT, REVERTED), EVENT_REVERTED: (ACTIVE,)}


def contradictions(entries: Sequence[PatchEntry], events: Sequence[PatchEvent]) -> Iterator[str]:
    """Yield in words where the records of a registry contradict each other, so that some were altered or removed.

    Args:
        entries: all edits.
        events: all events in order.
    """
    for what, records in (("events", events), ("edits", entries)):
        if [record.id for record in records] != list(range(1, len(records) + 1)):
            yield f"the numbers of the {what} have gaps: some were removed"
    known = {entry.id for entry in entries}
    for event in events:
        if event.edit not in known:
            yield f"event {event.id} is of edit {event.edit}, which is not recorded"
        if text := _measured_contradiction(event):
            yield f"event {event.id}: {text}"
    for entry in entries:
        yield from _history_contradictions(entry, [event for event in events if event.edit == entry.id])


def _history_contradictions(entry: PatchEntry, history: Sequence[PatchEvent]) -> Iterator[str]:
    """Yield what of one edit's record its events do not confirm."""
    state: str | None = None
    for event in history:
        if state not in _STATES_BEFORE[event.what]:
            yield f"event {event.id}: edit {entry.id} was {event.what} while it was {state or 'not there yet'}"
        state = _STATE_AFTER[event.what]
    if state != entry.state:
        yield f"edit {entry.id} is {entry.state}, but its history says otherwise"
    for event in history:
        if event.what == EVENT_ADDED and (event.at, event.who, event.why) != (entry.added, entry.who, entry.why):
            yield f"event {event.id} and the record of edit {entry.id} disagree on who added it, when or why"


def _measured_contradiction(event: PatchEvent) -> str | None:
    """Return in words what is wrong with the measurements that an event records."""
    measured = event.measured
    if measured is None:
        return None
    if event.what != EVENT_ACTIVATED:
        return "it is no activation, and records measurements"
    verdict, conflicts = measured.get("verdict"), measured.get("conflicts")
    if not _is_verdict(verdict) or not isinstance(conflicts, list):
        return "its measurements are malformed"
    if any(check["ok"] != _is_met(check) for check in verdict["checks"]):
        return "what was measured does not give the result of a check"
    if verdict["ok"] != (all(check["ok"] for check in verdict["checks"]) and not verdict["unmet"]):
        return "its checks do not give its verdict"
    if measured.get("forced") is not True and (conflicts or not verdict["ok"]):
        return "the edit was activated against its verdict, and was not forced"
    return None


def _is_verdict(verdict: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a value has the form of :meth:`remend.apps.acceptance.AcceptanceResult.to_json`."""
    if not isinstance(verdict, Mapping) or not isinstance(verdict.get("ok"), bool):
        return False
    checks = verdict.get("checks")
    return isinstance(checks, list) and all(map(_is_check, checks)) and isinstance(verdict.get("unmet"), list)


def _is_check(check: Any) -> bool:
    """Return whether a value has the form of an :class:`remend.apps.acceptance.AcceptanceCheck` as JSON."""
    numbers = isinstance(check, Mapping) and all(
        isinstance(check.get(key), int | float) for key in ("measured", "bound")
    )
    return numbers and isinstance(check.get("ok"), bool)


def _is_met(check: Mapping[str, Any]) -> bool:
    """Return whether what was measured for a criterion is within its bound."""
    if check.get("name") in AT_MOST:
        return bool(check["measured"] <= check["bound"])
    return bool(check["measured"] >= check["bound"])
