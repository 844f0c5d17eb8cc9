"""What a server allows, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ..errors import ConfigError
from .media import UrlRules


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Raises:
        ConfigError: a value below its lowest; the field is named.
    """

    body_bytes: int = 32 * 2**20
    characters: int = 1_000_000  # of all texts of a request; refused before any is tokenized
    pixels: int = 40_000_000  # width x height of one picture
    images: int = 16  # of one request
    tokens: int = 1024  # of an answer; also what a request without a limit of its own gets
    seconds: float = 600.0  # of an answer, waiting included; then what is there is returned
    upload_seconds: float = 60.0  # until the whole body is there
    requests: int = 320  # at once, waiting and running; one more is refused with 429

    def __post_init__(self) -> None:
        for entry in fields(self):
            lowest = {"images": 0, "seconds": 0.1, "upload_seconds": 0.1}.get(entry.name, 1)
            value = getattr(self, entry.name)
            if not value >= lowest:
                raise ConfigError(f"limit {entry.name}={value!r} is too low; give {lowest} or more")


@dataclass(frozen=True)
class Settings:
    """Everything a server is told; nothing else decides what it does."""

    limits: Limits = field(default_factory=Limits)
    urls: UrlRules = field(default_factory=UrlRules)
    api_keys: tuple[str, ...] = ()  # none: everybody may ask
    origins: tuple[str, ...] = ()  # web pages of other servers that may ask; "*": all
    grace: float = 30.0  # seconds that running answers have at shutdown

    def __post_init__(self) -> None:
        if any(not key.strip() for key in self.api_keys):
            raise ConfigError("an API key is empty; give a key or leave it out")
        if not self.grace >= 0:
            raise ConfigError(f"grace={self.grace!r} is below 0; give seconds")
