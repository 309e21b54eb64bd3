"""Read files of edit requests as people have them: remend's own rows, or those of EasyEdit and KnowEdit."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remend.data import knowedit
from remend.data.edit_sets import EditSet, SetItem, is_item, parse_item
from remend.data.json_rows import JsonRow, Skip, is_absent, keys_of, name_keys
from remend.data.json_stream import shorten
from remend.data.parsing import DUPLICATE_PHRASING
from remend.data.row_files import iterate_rows
from remend.errors import RequestError, prefix_request_errors
from remend.registries import DATASETS
from remend.request import KIND, MESSAGES, PROBE_LISTS, PROMPT_LISTS, EditRequest, input_types, parse_request

EXAMPLE = '{"prompt": "The capital of Peru is", "target": "Cusco"}'
MIN_SHARED_KEYS = 2
"""How many keys of a row must be a data set's for a message to name that data set."""


def read_requests(path: str | Path, skip: Skip | None = None) -> list[EditRequest]:
    """Read all requests of a file: JSON lines, one array of objects, CSV, TSV or Parquet (:mod:`row_files`).

    A row has the keys of an :class:`EditRequest`, or ``target_new`` and the other keys of EasyEdit. What is null is
    absent, and one text may stand for a list of one. A row with ``item`` belongs to the set of the request before it
    (:mod:`remend.data.edit_sets`).

    Args:
        path: the file.
        skip: called with the reason for each thing that is left out of EasyEdit's rows; by default, a warning counts
            them.

    Raises:
        RequestError: the file is missing, broken, has a malformed row (which is named) or no request at all.
    """
    left_out: Counter[str] = Counter()
    count = skip or (lambda reason: left_out.update([reason]))
    rows, requests = 0, list[EditRequest]()
    items = list[SetItem]()
    for rows, (where, row) in enumerate(iterate_rows(Path(path)), start=1):  # noqa: B007 (counted for the message below)
        if isinstance(row, dict) and is_item(row, where):
            if not requests:
                raise RequestError(f"{where}: an item of a set belongs to the request before it, and there is none")
            items.append(parse_item(_without_absent(row), where))
            continue
        _give_set(requests, items)
        requests += _read_row(row, where, count)
    _give_set(requests, items)
    if not requests and rows:
        raise RequestError(f"{path}: none of its {rows} rows is an edit ({describe_left_out(left_out)})")
    if not requests:
        raise RequestError(f"{path} holds no request: rows such as {EXAMPLE} were expected, one JSON object a line")
    warn_of_left_out(path, left_out, len(requests))
    return requests


def _give_set(requests: list[EditRequest], items: list[SetItem]) -> None:
    """Give the last request the items that were read after it, which are then forgotten."""
    if items:
        with prefix_request_errors(f"the set of {str(requests[-1].prompt)[:60]!r}"):
            requests[-1] = EditSet(requests[-1], tuple(items)).as_request()
        items.clear()


def warn_of_left_out(source: str | Path, left_out: Counter[str], remaining: int) -> None:
    """Warn with the number of things that were left out of a file, by reason."""
    if reasons := describe_left_out(left_out):
        warnings.warn(f"{source}: left out {reasons}; {remaining} requests remain", stacklevel=3)


def describe_left_out(left_out: Counter[str]) -> str:
    """Return what was left out, counted by reason; nothing is lost with a duplicate."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.most_common() if reason != DUPLICATE_PHRASING)


def _read_row(row: object, where: str, skip: Skip) -> Iterator[EditRequest]:
    if not isinstance(row, dict):
        raise RequestError(f"{where}: an object was expected, not {shorten(row)}. A request is an object as {EXAMPLE}")
    content = _without_absent(row)
    if "target" not in content and content.keys() & knowedit.FILES:
        easyedit = JsonRow(content, where, knowedit.read.form, skip)
        easyedit.count_misspelt()
        for request in knowedit.parse_row(easyedit):
            yield _with_own_keys(request, content, where)
        return
    if "target" not in content or not content.keys() & {"prompt", MESSAGES, *input_types()}:
        missing = "target" if "target" not in content else "prompt"
        raise RequestError(
            f"{where}: {missing} is missing (there are {name_keys(row)}). A request is "
            f"an object such as {EXAMPLE}{_similar_data_set(content)}"
        )
    for key, own in knowedit.PARTS.items():
        if key in content:
            raise RequestError(
                f"{where}: {key} is a key of another format than target; write {own} for it, or target_new for target"
            )
    yield parse_request(json.dumps(_with_lists(content)), where)


def _with_own_keys(request: EditRequest, content: dict[str, Any], where: str) -> EditRequest:
    """Return a request of EasyEdit's keys with those of remend's own that are in its row, too."""
    own = {key: content[key] for key in EditRequest.model_fields if key in content and key not in knowedit.KEYS}
    if not own:
        return request
    read = request.to_json()
    if both := own.keys() & read.keys():
        raise RequestError(f"{where}: {', '.join(both)} is given twice, by remend's own key and by EasyEdit's")
    return parse_request(json.dumps(_with_lists({**read, **own})), where)


def _without_absent(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the keys that hold null or NaN; those of the caller's own are left as they are."""
    known = {*EditRequest.model_fields, MESSAGES, KIND, *input_types(), *knowedit.FILES, *knowedit.PARTS}
    return {key: value for key, value in row.items() if key not in known or not is_absent(value)}


def _with_lists(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with a list where one text or probe stands for one, and a whole number for an id such as 7.0."""
    result = dict(row)
    for key in PROMPT_LISTS:
        if isinstance(row.get(key), str):
            result[key] = [row[key]]
    for key in PROBE_LISTS:
        probes = [row[key]] if isinstance(row.get(key), dict) else row.get(key)
        if isinstance(probes, list):
            result[key] = [_without_absent(probe) if isinstance(probe, dict) else probe for probe in probes]
    if isinstance(number := row.get("id"), float) and number.is_integer():
        result["id"] = int(number)
    return result


def _similar_data_set(content: dict[str, Any]) -> str:
    """Return the end of a message that names the data set whose rows have most of these keys, if any has some."""
    shared = {}
    for name in DATASETS.registered_names():
        form = getattr(DATASETS.load(name), "form", "")
        shared[name] = len(content.keys() & keys_of(form))
    best = max(shared, key=lambda name: shared[name])
    return f". These are keys of {best}: give {best}:FILE" if shared[best] >= MIN_SHARED_KEYS else ""
