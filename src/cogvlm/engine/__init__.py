"""Generation for one process: streaming, batches, and a stop to endless repetition.

Gets a loaded model and encoded prompts; reads no model files and knows no prompt formats.
"""

from __future__ import annotations

from .batch import Summary, run_file
from .generate import Answer, GenerationSettings, Stream, complete, generate, stream

__all__ = [
    "Answer",
    "GenerationSettings",
    "Stream",
    "Summary",
    "complete",
    "generate",
    "run_file",
    "stream",
]
