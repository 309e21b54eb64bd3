"""``read_report``: read a report file, validated against the schema of reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from remend.errors import FileError
from remend.evaluation.reports.report import SCHEMA, Case, Report, Run, summaries_from_json

Numbers = dict[str, FiniteFloat]


class _Object(BaseModel):
    # Strict: a report that was changed by hand or by another tool is refused rather than guessed at.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_Interval = Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]


class _Summary(_Object):
    mean: FiniteFloat
    ci95: _Interval
    n: Annotated[int, Field(ge=1)]


_Metrics = dict[str, dict[str, _Summary]]


class _Answer(_Object):
    kind: str
    prompt: str
    wanted: str | None
    before: str
    after: str
    ok: bool | None


class _Case(_Object):
    id: str | int
    prompt: str
    target: str
    before: str
    about: dict[str, str | FiniteFloat]
    values: dict[str, Numbers]
    answers: list[_Answer]
    intervals: dict[str, _Interval] = Field(default_factory=dict)  # older reports lack it


class _Run(_Object):
    edits: Annotated[int, Field(ge=1)]
    seconds_per_edit: FiniteFloat
    metrics: _Metrics
    cases: Annotated[list[_Case], Field(min_length=1)]
    abilities: dict[str, _Summary] = Field(default_factory=dict)  # older reports lack it


class _Baseline(_Object):
    metrics: _Metrics
    cases: list[_Case]


class _Point(_Object):
    scale: FiniteFloat
    metrics: _Metrics


class _BeforeAfter(_Object):
    before: FiniteFloat
    after: FiniteFloat


class _Report(_Object):
    schema_: Annotated[Literal["remend.report/2"], Field(alias="schema")]
    model: str
    data: str
    editor: str
    protocol: Literal["single", "batched", "sequential", "checkpoints"]
    runs: Annotated[list[_Run], Field(min_length=1)]
    baselines: dict[str, _Baseline]
    frontier: list[_Point]
    retention: list[list[FiniteFloat]]
    text: Numbers
    settings: dict[str, JsonValue]
    left_out: dict[str, int]
    general: dict[str, dict[str, _BeforeAfter]] = Field(default_factory=dict)  # older reports lack it
    peak_memory_bytes: int | None
    environment: dict[str, JsonValue]


def read_report(path: str | Path) -> Report:
    """Read a report that :meth:`Report.save` wrote. Means are computed again from its cases, not taken from the file.

    The file holds no cases of the frontier, so the report has no frontier.

    Raises:
        FileError: the file cannot be read, or is no report of this version; the message names the key.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise FileError(
            f"cannot read {path}: {error.strerror}; give a report that remend evaluate --json wrote"
        ) from None
    try:
        content = _Report.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FileError(
            f"{path} is not a report of {SCHEMA} ({key or 'the file'}: {first['msg']}): run the evaluation again"
        ) from None
    return Report(
        model=content.model,
        data=content.data,
        editor=content.editor,
        protocol=content.protocol,
        runs=[
            Run(run.edits, _cases(run.cases), run.seconds_per_edit, summaries_from_json(_dump(run.abilities)))
            for run in content.runs
        ],
        baselines={name: _cases(baseline.cases) for name, baseline in content.baselines.items()},
        text=content.text,
        left_out=content.left_out,
        settings=content.settings,
        general={
            task: {metric: scores.model_dump() for metric, scores in by_metric.items()}
            for task, by_metric in content.general.items()
        },
        environment=content.environment,
    )


def _dump(summaries: dict[str, _Summary]) -> dict[str, dict[str, Any]]:
    return {name: summary.model_dump() for name, summary in summaries.items()}


def _cases(cases: list[_Case]) -> list[Case]:
    return [Case.from_json(case.model_dump()) for case in cases]
