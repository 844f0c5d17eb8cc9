"""Generation for one process: streaming, batches, and a stop to endless repetition.

Gets a loaded model and encoded prompts; reads no model files and knows no prompt formats.  Two
ways: ``complete``, ``stream`` and ``generate`` answer a batch with transformers' own loop;
:class:`Engine` answers many callers together, each with settings of its own.
"""

from __future__ import annotations

from ..settings import GenerationSettings
from .batch import Summary, run_file
from .generate import Answer, Stream, complete, generate, stream
from .grammar import Grammar
from .local import LocalBackend
from .sampling import Sampling, TokenLogprob
from .service import Busy, Engine, EngineStats, Piece, Ticket

__all__ = [
    "Answer",
    "Busy",
    "Engine",
    "EngineStats",
    "GenerationSettings",
    "Grammar",
    "LocalBackend",
    "Piece",
    "Sampling",
    "Stream",
    "Summary",
    "Ticket",
    "TokenLogprob",
    "complete",
    "generate",
    "run_file",
    "stream",
]
