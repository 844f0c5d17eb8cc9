"""Data to fine-tune on: files as people have them -> records, mixed, shuffled and checked.

``index`` and ``media`` (bytes) -> ``shapes`` (objects) -> ``sources`` -> ``mix`` and ``check``.
Imports no torch.
"""

from __future__ import annotations

from .mix import Entry, Mix, is_held_out
from .recognise import FORMATS, open_source
from .record import Record, RecordError
from .sources import Options, Source

__all__ = [
    "FORMATS",
    "Entry",
    "Mix",
    "Options",
    "Record",
    "RecordError",
    "Source",
    "is_held_out",
    "open_source",
]
