"""The wordings of questions, each with places for what is asked about."""

from __future__ import annotations

ASK = {
    "read": (
        "What does the picture say?", "Read the text.", "What is written here?",
        "Write out all text in the picture.", "Transcribe this.",
    ),
    "read zh": ("图片上写着什么？", "请读出文字。"),
    "caption": (
        "Describe this picture.", "What is this?", "What does the picture show?",
        "What can be seen here?",
    ),
    "read a place": ("What is written at {}?", "Read the text in {}.", "What does {} say?"),
    "where": ("Where is {}?", "Find {}.", "Give the place of {}."),
    "what": ("What is at {}?", "What is in {}?"),
    "table": (
        "Write out the table.", "Give all values as a table.", "List the data behind the picture.",
    ),
    "latex": ("Write this page as LaTeX.", "Give the LaTeX source."),
    "formula": ("Write the formula as LaTeX.", "What is the formula in LaTeX?"),
}  # fmt: skip

SHORT = (" Short answer.", " Answer in a few words.", " Give the value only.", "", "")
"""Cues of questions that are answered with a word or a number."""

YES_NO = " Answer yes or no."
"""Cue of questions that are answered so."""

FULL = (" Answer in a sentence.", " Answer in full.")
"""Cues of questions that are answered with a sentence."""

ABSENT = ("not in the picture", "It is not in the picture.", "That is not in the picture.")
"""What is said of things that are asked for and not there."""
