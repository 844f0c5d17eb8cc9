"""Runs recipes as one of several processes: ``python crowd.py JOBS.json``.

Each job is ``{"recipe", "out", "port"}``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cogvlm.train.run import run


def main(jobs: Path) -> None:
    """One run after another; this process is the same rank in all."""
    for job in json.loads(jobs.read_text()):
        os.environ["MASTER_PORT"] = str(job["port"])
        run(Path(job["recipe"]), [], Path(job["out"]), True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
