"""A conversation as a person has it in a terminal: what was typed, what is kept, what is asked.

Prints nothing and reads no keyboard; :mod:`cogvlm.cli.chat` does.
"""

from __future__ import annotations

from .keep import load_messages, save_messages
from .session import COMMANDS, Ask, Said, Session

__all__ = ["COMMANDS", "Ask", "Said", "Session", "load_messages", "save_messages"]
