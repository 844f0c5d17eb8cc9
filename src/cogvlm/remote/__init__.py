"""A server elsewhere in place of a model of ours.

:class:`RemoteBackend` asks it for us, :class:`Forwarder` on behalf of others.
"""

from __future__ import annotations

from .client import Endpoint, RemoteBackend
from .forward import Forwarder, Upstream

__all__ = ["Endpoint", "Forwarder", "RemoteBackend", "Upstream"]
