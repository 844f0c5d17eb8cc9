"""The HTTP server: OpenAI's and Ollama's wire formats in front of one engine or a server elsewhere.

``protocol`` (wire types) and ``media`` (reading pictures) know no engine; ``desk`` asks the engine
and watches its callers, ``relay`` asks the server elsewhere, ``front`` is what the two share;
``openai`` and ``ollama`` are routes; ``gate`` stands before all of them; ``app`` puts the parts
together and ``server`` runs them.
"""

from __future__ import annotations

from .app import build
from .desk import Desk, facts_of
from .front import Facts
from .limits import Limits, Settings
from .media import UrlRules
from .relay import Relay
from .server import Server, bind

__all__ = [
    "Desk",
    "Facts",
    "Limits",
    "Relay",
    "Server",
    "Settings",
    "UrlRules",
    "bind",
    "build",
    "facts_of",
]
