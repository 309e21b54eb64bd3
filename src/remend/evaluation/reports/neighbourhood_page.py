"""``write_neighbourhood_page``: what an edit did around its request, as one HTML file with a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from remend.evaluation.neighbourhood import PLACES, Neighbour
from remend.evaluation.reports.html_report import visible
from remend.request import EditRequest
from remend.saved_folders import write_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 420, 76, 876, 16, 366
"""The picture's size and the edges of its axes, in pixels."""

BESIDE = 4
"""How far points that would lie on each other are apart, in pixels."""

DISTANCES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
"""Distances at which the picture has a line, as far as there are points."""

EFFECTS = (0.01, 0.1, 1.0, 10.0)
"""Effects at which the picture has a line, in nats."""


def write_neighbourhood_page(
    found: Sequence[tuple[EditRequest, Sequence[Neighbour]]], path: str | Path, model: str = "", note: str = ""
) -> None:
    """Write a page that needs no network and no other file: the pair, a picture, and every prompt by what it is.

    Args:
        found: each request with its neighbourhood (:func:`remend.evaluation.neighbourhood.measure_neighbourhood`).
        path: where.
        model: the model's name.
        note: what to know of the edit, in a sentence, above everything.

    Raises:
        FileError: the file cannot be written.
    """
    environment = Environment(
        autoescape=True, finalize=visible, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("remend.evaluation.reports").joinpath("neighbourhood_page.html.j2")
    page = environment.from_string(template.read_text(encoding="utf-8")).render(
        pages=[_page(request, neighbours) for request, neighbours in found], model=model, note=note
    )
    write_text(path, page)


def _page(request: EditRequest, neighbours: Sequence[Neighbour]) -> dict[str, Any]:
    """Return what the template shows of one request."""
    pair, *others = neighbours
    farthest = max(1.0, *(each.distance for each in neighbours)) * 1.05
    most = max(0.1, *(each.effect for each in neighbours)) * 1.2

    def x(distance: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (distance / farthest), 1)

    def y(effect: float) -> float:
        # Effects span several orders of magnitude, and most are 0.
        return round(BOTTOM - (BOTTOM - TOP) * math.log1p(100 * max(effect, 0.0)) / math.log1p(100 * most), 1)

    groups = []
    for place in PLACES[1:]:
        rows = sorted((each for each in others if each.place == place), key=lambda each: -each.effect)
        if rows:
            groups.append(
                {
                    "place": PLACES.index(place),
                    "name": place,
                    "rows": rows,
                    "moves": rows[0].moves,
                    "done": "followed" if rows[0].moves else "stayed",
                    "right": sum(each.ok for each in rows),
                    "given": sum(each.given for each in rows),
                }
            )
    return {
        "prompt": str(request.prompt),
        "target": request.target,
        "pair": pair,
        "groups": groups,
        "points": [
            {
                # Prompts about one subject are all as near: beside each other they can be told apart.
                "x": x(each.distance) + (number % 9 - 4) * BESIDE * (each is not pair),
                "y": y(each.effect),
                "place": PLACES.index(each.place),
                "ok": each.ok,
                "prompt": each.answer.prompt,
                "before": each.answer.before,
                "after": each.answer.after,
                "outcome": each.outcome,
            }
            for number, each in reversed(list(enumerate(neighbours)))  # the pair is drawn last, on top
        ],
        "x_ticks": [{"at": x(value), "label": f"{value:g}"} for value in DISTANCES if value <= farthest],
        "y_ticks": [{"at": y(value), "label": f"{value:g}"} for value in (0.0, *EFFECTS) if value <= most],
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": RIGHT,
        "top": TOP,
        "bottom": BOTTOM,
    }
