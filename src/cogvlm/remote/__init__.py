"""A server elsewhere in place of a model of ours: see :class:`RemoteBackend`."""

from __future__ import annotations

from .client import Endpoint, Forwarded, RemoteBackend, about

__all__ = ["Endpoint", "Forwarded", "RemoteBackend", "about"]
