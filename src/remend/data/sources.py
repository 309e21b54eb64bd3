"""Naming a set of requests on the command line."""

from __future__ import annotations

from remend.assets import ATLAS
from remend.data import atlas
from remend.request import EditRequest, read_requests


def read_source(source: str) -> list[EditRequest]:
    """The requests that ``source`` names: ``atlas:train``, ``atlas:validation``, ``atlas:test`` or a JSON-lines file.

    Raises:
        RequestError: there is no such split or file, or a line of it is malformed.
    """
    kind, colon, split = source.partition(":")
    if kind == ATLAS and colon:
        return list(atlas.requests(split))
    return read_requests(source)
