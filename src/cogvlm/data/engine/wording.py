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
    "value": (
        "What is the {n} of {o}?", "{o}: what is the {n}?", "Give the {n} of {o}.",
        "What {n} is listed for {o}?", "Which {n} does {o} have?", 'What is the {n} for "{o}"?',
        "In the row {o}, what is the {n}?", 'What stands under {n} for "{o}"?',
    ),
    "fact": (
        "What is the {n}?", "Which {n} is given?", "Find the {n}.", "What {n} does it show?",
        "{N}?", "Tell me the {n}.", "What does it say for {n}?",
    ),
    "row": (
        "Which {h} has the {n} {v}?", "Whose {n} is {v}?", 'What has "{v}" as its {n}?',
        "{n} {v}: which {h} is it?",
    ),
    "beside": (
        'What stands beside "{o}"?', 'What is listed for "{o}"?', 'What does it say about "{o}"?',
        'What comes after "{o}" in its row?',
    ),
    "below": (
        'What stands below "{}"?', 'What comes after "{}"?', 'Which line comes after "{}"?',
        'What is written under "{}"?',
    ),
    "above": (
        'What stands above "{}"?', 'What comes before "{}"?', 'Which line comes before "{}"?',
        'What is written over "{}"?',
    ),
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
