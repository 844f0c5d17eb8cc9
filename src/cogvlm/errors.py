"""Every exception this package raises on purpose.

::

    CogVLMError
    ├── InputError (also ValueError)   something the caller gave is not usable
    │   ├── ImageError                 a picture: missing, broken, too large
    │   ├── MessageError               a conversation: order, roles, too many images
    │   └── ConfigError                a configuration or recipe: unknown key, impossible value
    ├── CheckpointError                files of a model: missing, truncated, wrong tensors
    ├── DownloadError                  something could not be fetched or failed its checksum
    ├── RemoteError                    a server that was asked instead of a model of ours
    └── ResourceError                  not enough memory, disk, or no such device

A message says what was wrong, where, which limit applied and what to do about it, in one line.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CogVLMError(Exception):
    """Base of every error raised on purpose; the CLI prints it as one line."""


class InputError(CogVLMError, ValueError):
    """Something the caller gave is not usable."""


class ImageError(InputError):
    """A picture is missing, broken, or over a limit."""


class MessageError(InputError):
    """A conversation has a wrong order, role or number of images."""


class ConfigError(InputError):
    """A configuration or recipe has an unknown key or an impossible value."""


class CheckpointError(CogVLMError):
    """The files of a model are missing, damaged, or do not fit the configuration."""


class DownloadError(CogVLMError):
    """A file could not be fetched, or what came failed its checksum."""


class RemoteError(CogVLMError):
    """A server that was asked in place of a local model refused, failed or cannot be reached.

    Attributes:
        stops: The next request would fare no better: a wrong key, no connection, a limit reached.
    """

    def __init__(self, message: str, *, stops: bool = True) -> None:
        super().__init__(message)
        self.stops = stops


class ResourceError(CogVLMError):
    """Not enough memory or disk, or no such device."""


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise :class:`ConfigError` if a key of ``given`` is not in ``known``.

    The message names the nearest known key.

    >>> refuse_unknown(["hiden_size"], ["hidden_size"], "config.json")
    Traceback (most recent call last):
    ...
    cogvlm.errors.ConfigError: config.json: unknown key 'hiden_size'; did you mean 'hidden_size'?
    """
    known = sorted(known)
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
