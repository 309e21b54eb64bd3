"""Naming a set of requests on the command line."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from remend.data.json_rows import Skip, ignore
from remend.data.parsing import DOUBLE
from remend.data.registry import BUILT_IN, DATA_SETS
from remend.errors import RequestError, nearest
from remend.request import EditRequest, read_requests

HUB = "hf:"
"""What begins the name of a file on the Hugging Face hub: ``hf:owner/name/file.json``, or ``hf:owner/name``."""
_NAME = re.compile(r"[A-Za-z_]\w+")  # of two letters at least: C:\x is a place on a drive


def read_source(source: str) -> list[EditRequest]:
    """The requests that ``source`` names.

    - ``atlas:train``, ``atlas:validation`` or ``atlas:test``, and likewise of ``questions`` and ``claims``: a split of
      what ships with remend;
    - ``counterfact:FILE``, ``zsre:FILE`` …: a file of a published data set, which ``remend data list`` lists;
    - the path of a JSON-lines file of requests.

    FILE is a path, or ``hf:owner/name/file.json`` on the Hugging Face hub (without a file, where there is only one).
    Of what a data set's reader leaves out of a file, a warning tells.

    Raises:
        RequestError: there is no such split or file, or a row of it is malformed.
    """
    left_out: Counter[str] = Counter()
    requests = list(iterate_source(source, lambda reason: left_out.update([reason])))
    del left_out[DOUBLE]  # nothing is lost by that
    if left_out:
        told = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        warnings.warn(f"{source}: left out {told}; {len(requests)} requests remain", stacklevel=2)
    return requests


def iterate_source(source: str, skip: Skip = ignore) -> Iterator[EditRequest]:
    """The same, one after another, where the file's form allows; ``skip`` is told what is left out and why.

    Raises:
        RequestError: as :func:`read_source`; for a row, when it is reached.
    """
    kind, rest = parted(source)
    if kind in BUILT_IN:
        return iter(BUILT_IN[kind](rest))
    if kind is None:
        return iter(read_requests(local(rest)))
    read = DATA_SETS[kind].read
    if read is None:
        raise RequestError(
            f"{kind} are made by a model: remend data convert {source} --model MODEL --out FILE.jsonl, then give that "
            "file"
        )
    return _some(read(local(rest), skip), source)


def parted(source: str) -> tuple[str | None, str]:
    """The data set that ``source`` names, if it names one, and the split or file of it.

    Raises:
        RequestError: it looks as if it named one, but there is none of that name, nor such a file.
    """
    name, colon, rest = source.partition(":")
    known = (*BUILT_IN, *DATA_SETS)
    if not colon or source.startswith(HUB):
        return None, source
    if name in known and (rest or name in BUILT_IN):
        return name, rest
    if name in known:
        raise RequestError(f"{source} names no file: write {name}:FILE")
    if _NAME.fullmatch(name) and not Path(source).exists():
        raise RequestError(f"there is no data set {name!r} ({source}), nor a file of that name; {nearest(name, known)}")
    return None, source


def local(place: str) -> Path:
    """The path of a file, fetched first if it is on the hub.

    Raises:
        RequestError: it cannot be fetched, or the repository has several data files and none was named.
    """
    if not place.startswith(HUB):
        return Path(place)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    owner, _, rest = place.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name):
        raise RequestError(f"{place} is no file on the hub: write {HUB}owner/name/file.json")
    repository = f"{owner}/{name}"
    try:
        chosen = file or _only_file(huggingface_hub.list_repo_files(repository, repo_type="dataset"), place)
        return Path(huggingface_hub.hf_hub_download(repository, chosen, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise RequestError(f"{place} cannot be fetched ({first}): check the name, or give a local file") from None


def _only_file(files: list[str], place: str) -> str:
    data = [file for file in files if file.endswith((".json", ".jsonl"))]
    if len(data) != 1:
        listed = ", ".join(data[:8]) or "none that ends with .json or .jsonl"
        raise RequestError(f"{place} has {len(data)} data files ({listed}): name one, as {HUB}owner/name/file.json")
    return data[0]


def _some(requests: Iterator[EditRequest], source: str) -> Iterator[EditRequest]:
    """The same requests, if there are any."""
    found = False
    for request in requests:
        found = True
        yield request
    if not found:
        raise RequestError(f"{source}: none of its rows is an edit; remend data convert tells why each was left out")
