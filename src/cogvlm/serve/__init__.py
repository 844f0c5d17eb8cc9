"""The HTTP server: OpenAI's and Ollama's wire formats in front of one engine.

``protocol`` (wire types) and ``media`` (reading pictures) know no engine; ``desk`` asks the engine
and watches its callers; ``openai`` and ``ollama`` are routes; ``gate`` stands before all of them;
``app`` puts the parts together and ``server`` runs them.
"""

from __future__ import annotations

from .app import build
from .desk import Desk, Facts, facts_of
from .limits import Limits, Settings
from .media import UrlRules
from .server import Server, bind

__all__ = ["Desk", "Facts", "Limits", "Server", "Settings", "UrlRules", "bind", "build", "facts_of"]
