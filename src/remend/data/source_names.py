"""Source names such as ``atlas:train``, ``zsre:FILE`` and ``hf:owner/name/file.json``: parsed, fetched and read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from remend.data.json_rows import Skip, ignore
from remend.data.request_files import read_requests, warn_of_left_out
from remend.errors import RequestError, nearest
from remend.registries import DATASETS
from remend.request import EditRequest

HUB_PREFIX = "hf:"
"""The prefix of a file on the Hugging Face hub: ``hf:owner/name/file.json``, or ``hf:owner/name``."""
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""The endings of files that are taken for data in a repository of the hub."""
# At least two letters, since C:\x is a path on a drive.
_DATA_SET_NAME = re.compile(r"[A-Za-z_]\w+")


def read_source(source: str) -> list[EditRequest]:
    """Return the requests that ``source`` names.

    - ``atlas:train``, ``atlas:validation`` or ``atlas:test``, and likewise of ``questions`` and ``claims``: a split of
      what ships with remend;
    - ``counterfact:FILE``, ``zsre:FILE`` …: a file of a published data set, which ``remend data list`` lists;
    - the path of a file of requests: JSON lines, one array of objects, CSV, TSV or Parquet; gzipped, too.

    FILE is a path, or ``hf:owner/name/file.json`` on the Hugging Face hub (without a file, where there is only one).
    A warning counts what a data set's reader leaves out of a file.

    Raises:
        RequestError: there is no such split or file, or a row of it is malformed.
    """
    skipped: Counter[str] = Counter()
    requests = list(iterate_source(source, lambda reason: skipped.update([reason])))
    warn_of_left_out(source, skipped, len(requests))
    return requests


def iterate_source(source: str, skip: Skip = ignore) -> Iterator[EditRequest]:
    """Yield the requests that ``source`` names, one after another where the file's form allows.

    Args:
        source: as for :func:`read_source`.
        skip: called with the reason for each thing that is left out.

    Raises:
        RequestError: as :func:`read_source`; for a row, when it is reached.
    """
    name, rest = parse_source_name(source)
    if name is None:
        return iter(read_requests(local_path(rest), skip))
    data_set = DATASETS.get(name)
    if data_set.needs_model:
        raise RequestError(
            f"a model makes the requests of {name}: run remend data convert {source} --model MODEL --out FILE.jsonl, "
            "then give that file"
        )
    read = DATASETS.load(name)
    if data_set.splits:
        if rest not in data_set.splits:
            known = ", ".join(f"{name}:{split}" for split in data_set.splits)
            raise RequestError(f"{name} has no split {rest!r}; it has {known}")
        return iter(read(rest))
    return _not_empty(read(local_path(rest), skip), source)


def parse_source_name(source: str) -> tuple[str | None, str]:
    """Return the data set that ``source`` names (None for a plain file), and the split or file.

    Raises:
        RequestError: it looks like the name of a data set, but there is none of that name, nor such a file.
    """
    name, colon, rest = source.partition(":")
    if not colon or source.startswith(HUB_PREFIX):
        return None, source
    if name in DATASETS:
        # "atlas:" goes on, since the error about an unknown split lists the splits.
        if not rest and not DATASETS.get(name).splits:
            raise RequestError(f"{source} names no file: write {name}:FILE")
        return name, rest
    # A file may have a colon in its name, so what looks like an unknown data set is an error only without such a file.
    if _DATA_SET_NAME.fullmatch(name) and not Path(source).exists():
        raise RequestError(
            f"there is no data set {name!r} ({source}), nor a file of that name; {nearest(name, DATASETS.names())}"
        )
    return None, source


def local_path(file: str) -> Path:
    """Return the path of a file, which is downloaded first if its name begins with ``hf:``.

    Raises:
        RequestError: it cannot be fetched, or the repository has several data files and none was named.
    """
    if not file.startswith(HUB_PREFIX):
        return Path(file)
    # Imported here, so that local files need no hub client.
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    from remend.hub_lookup import check_on_hub, readable_hub_errors

    owner, _, rest = file.removeprefix(HUB_PREFIX).partition("/")
    name, _, path = rest.partition("/")
    if not (owner and name):
        raise RequestError(f"{file} is no file on the hub: write {HUB_PREFIX}owner/name/file.json")
    repository = f"{owner}/{name}"
    try:
        if not path:
            with readable_hub_errors():
                paths = huggingface_hub.list_repo_files(repository, repo_type="dataset")
            path = _only_data_file(paths, file)
        check_on_hub(repository, path, "dataset")
        return Path(huggingface_hub.hf_hub_download(repository, path, repo_type="dataset"))
    except (EntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"{file} cannot be fetched ({reason}): check the name, or give a local file") from None


def _only_data_file(paths: list[str], repository: str) -> str:
    data = [path for path in paths if path.removesuffix(".gz").endswith(DATA_SUFFIXES)]
    if len(data) != 1:
        names = ", ".join(data[:8]) or f"none that ends with {', '.join(DATA_SUFFIXES)}"
        raise RequestError(
            f"{repository} has {len(data)} data files ({names}): name one, as {HUB_PREFIX}owner/name/file.json"
        )
    return data[0]


def _not_empty(requests: Iterator[EditRequest], source: str) -> Iterator[EditRequest]:
    """Yield the same requests, and raise at the end if there was none."""
    empty = True
    # Not list(requests): a file may be larger than memory.
    for request in requests:
        empty = False
        yield request
    if empty:
        raise RequestError(f"{source}: none of its rows is an edit; remend data convert tells why each was left out")
