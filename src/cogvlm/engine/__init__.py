"""Generation for one process: streaming, batches, and a stop to endless repetition.

Gets a loaded model and encoded prompts; reads no model files and knows no prompt formats.  Two
ways: ``generate`` answers a batch with transformers' own loop; :class:`Engine` answers many callers
together, each with settings of its own, and ``complete`` and ``stream`` one.
"""

from __future__ import annotations

from ..settings import GenerationSettings
from .batch import Summary, run_file
from .generate import Answer, generate
from .grammar import Grammar
from .local import LocalBackend
from .sampling import Sampling, TokenLogprob
from .service import Busy, Engine, EngineStats, Piece, Ticket
from .single import Stream, complete, stream

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
