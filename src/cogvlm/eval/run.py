"""Answer a file of questions whose truths are known, and score the answers.

The file is one for ``cogvlm run`` with a ``truth`` in every line: a text, or a list of texts of
which each is right.  A line may name its ``metric`` (see :mod:`cogvlm.score`) and its ``kind``, by
which figures are also given apart.  Answers are kept beside the score, to be looked into.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..backend import Backend
from ..engine import GenerationSettings, run_file
from ..engine.batch import Progress
from ..errors import InputError
from ..load import Loaded
from ..score import METRICS, Scores, Truth


@dataclass(frozen=True)
class Wanted:
    """What one line of a file of questions asks for."""

    key: str
    truth: Truth
    metric: str
    kind: str | None = None


@dataclass(frozen=True)
class Score:
    """Figures of one file."""

    name: str
    lines: int
    failed: int  # no answer; scored as an empty one
    scores: Scores  # of all lines, by metric
    kinds: dict[str, dict[str, float]]  # the same of each kind, where lines name theirs
    seconds: float  # of this run; answers that were there before cost nothing


def wanted(requests: Path, metric: str = "cer") -> list[Wanted]:
    """What each line asks for; ``metric`` is that of the lines that name none.

    Raises:
        InputError: a line without an id or a truth, an unknown metric, or not JSON.
    """
    found = []
    for number, line in enumerate(requests.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            found.append(_wanted(line, f"{requests}:{number}", metric))
    if not found:
        raise InputError(f"{requests}: no lines to score")
    return found


def _wanted(line: str, where: str, metric: str) -> Wanted:
    try:
        values = json.loads(line)
        key, truth = str(values["id"]), values["truth"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: needs 'id' and 'truth' in one JSON object ({error})") from error
    truths = truth if isinstance(truth, list) else [truth]
    if not truths or not all(isinstance(t, (str, int, float)) for t in truths):
        raise InputError(f"{where}: 'truth' is a text, or a list of texts of which each is right")
    metric, kind = values.get("metric", metric), values.get("kind")
    if metric not in METRICS:
        raise InputError(f"{where}: no metric {metric!r}; there are {', '.join(METRICS)}")
    return Wanted(key, tuple(map(str, truths)), metric, None if kind is None else str(kind))


def scores_of(lines: Iterable[Wanted], given: dict[str, str]) -> dict[str, float]:
    """Figures of ``lines``, those of each metric over the lines that name it."""
    by_metric: dict[str, list[Wanted]] = {}
    for line in lines:
        by_metric.setdefault(line.metric, []).append(line)
    found: Scores = {}
    for metric, some in by_metric.items():
        said = [given.get(line.key, "") for line in some]
        for name, value in METRICS[metric](said, [line.truth for line in some]).items():
            # Two metrics may share a name ("exact"): the first keeps it bare.
            found[name if name not in found else f"{metric}.{name}"] = round(value, 4)
    return found


def score_answers(requests: Path, answers: Path, metric: str = "cer") -> Score:
    """Score answers that are there, by whatever program they were given.

    Raises:
        InputError: as :func:`wanted`, or a file of answers that is none.
    """
    lines = wanted(requests, metric)
    given: dict[str, str] = {}
    errors = 0
    for number, line in enumerate(answers.read_text(encoding="utf-8").splitlines(), 1):
        values = _answer(line, f"{answers}:{number}")
        errors += "error" in values
        given[str(values["id"])] = str(values.get("prediction", "")).strip()
    kinds: dict[str, list[Wanted]] = {}
    for want in lines:
        if want.kind is not None:
            kinds.setdefault(want.kind, []).append(want)
    return Score(
        name=requests.parent.name or requests.stem,
        lines=len(lines),
        failed=errors + sum(line.key not in given for line in lines),
        scores=scores_of(lines, given),
        kinds={
            kind: {"lines": len(some), **scores_of(some, given)}
            for kind, some in sorted(kinds.items())
        },
        seconds=0.0,
    )


def _answer(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        values["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: no answer of 'cogvlm run' ({error})") from error
    assert isinstance(values, dict)
    return values


def score_file(
    requests: Path,
    answers: Path,
    loaded: Loaded | Backend,
    batch_size: int = 16,
    settings: GenerationSettings | None = None,
    progress: Progress | None = None,
    metric: str = "cer",
) -> Score:
    """Answer what has no answer yet in ``answers``, then score everything.

    Raises:
        InputError: as :func:`wanted` and :func:`cogvlm.engine.run_file`.
    """
    wanted(requests, metric)  # what cannot be scored is not worth answering
    settings = settings or GenerationSettings(max_new_tokens=96)
    summary = run_file(requests, answers, loaded, settings, batch_size, progress)
    return replace(score_answers(requests, answers, metric), seconds=round(summary.seconds, 1))


def as_line(score: Score) -> str:
    """One JSON line."""
    kinds = {"kinds": score.kinds} if score.kinds else {}
    head = {"name": score.name, "lines": score.lines, "failed": score.failed}
    return json.dumps(
        {**head, **score.scores, **kinds, "seconds": score.seconds}, ensure_ascii=False
    )
