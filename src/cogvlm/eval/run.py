"""Answer a file of questions whose truths are known, and score the answers.

The file is one for ``cogvlm run`` with a ``truth`` in every line.  Answers are kept beside the
score, so a figure can be looked into.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..engine import GenerationSettings, run_file
from ..engine.batch import Progress
from ..errors import InputError
from ..load import Loaded
from ..score import cer


@dataclass(frozen=True)
class Score:
    """Figures of one file."""

    name: str
    lines: int
    failed: int  # no answer; scored as an empty one
    cer: float  # character error rate
    exact: float  # share of answers equal to the truth
    seconds: float  # of this run; answers that were there before cost nothing


def truths(requests: Path) -> dict[str, str]:
    """Truth by id.

    Raises:
        InputError: a line without an id or a truth, or not JSON.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(requests.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            found[str(values["id"])] = str(values["truth"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{requests}:{number}: needs 'id' and 'truth' in one JSON object ({error})"
            ) from error
    if not found:
        raise InputError(f"{requests}: no lines to score")
    return found


def score_file(
    requests: Path,
    answers: Path,
    loaded: Loaded,
    batch_size: int = 16,
    settings: GenerationSettings | None = None,
    progress: Progress | None = None,
) -> Score:
    """Answer what has no answer yet in ``answers``, then score everything.

    Raises:
        InputError: as :func:`truths` and :func:`cogvlm.engine.run_file`.
    """
    expected = truths(requests)
    settings = settings or GenerationSettings(max_new_tokens=96)
    summary = run_file(requests, answers, loaded, settings, batch_size, progress)
    given: dict[str, str] = {}
    for line in answers.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        given[str(values["id"])] = values.get("prediction", "").strip()
    predictions = [given.get(key, "") for key in expected]
    wanted = list(expected.values())
    same = sum(p == t for p, t in zip(predictions, wanted, strict=True))
    return Score(
        name=requests.parent.name,
        lines=len(wanted),
        failed=summary.failed,
        cer=round(cer(predictions, wanted), 4),
        exact=round(same / len(wanted), 4),
        seconds=round(summary.seconds, 1),
    )


def as_line(score: Score) -> str:
    """One JSON line."""
    return json.dumps(asdict(score))
