"""A folder of pictures to captions: sidecar files, JSON lines or webdataset shards.

``pictures`` (which) -> ``prompt`` (the question) -> ``work`` (answers, from one process or through
``spread`` from several) -> ``sinks`` (files) -> ``run`` (all of it, and the report).  Imports no
torch: what answers is a :class:`cogvlm.backend.Backend`.
"""

from __future__ import annotations

from .pictures import Failure, Picture, find
from .prompt import Prompt
from .run import Summary, caption_folder
from .sinks import Lines, Shards, Sidecars, Sink
from .spread import spread
from .work import Caption, Job, Result, work

__all__ = [
    "Caption",
    "Failure",
    "Job",
    "Lines",
    "Picture",
    "Prompt",
    "Result",
    "Shards",
    "Sidecars",
    "Sink",
    "Summary",
    "caption_folder",
    "find",
    "spread",
    "work",
]
