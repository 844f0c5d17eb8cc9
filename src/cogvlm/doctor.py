"""What is installed, what this machine has, and what would run on it.

Loads no model. Imports torch when called.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, hub
from .devices import Device, find_devices

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "Pillow")


@dataclass(frozen=True)
class Fit:
    """Whether a model runs here: ``device`` is ``None`` where it does not.

    ``precision`` is what ``--precision auto`` takes there, or the smallest there is; ``needs_gb``
    (10**9 bytes) is what it needs for a picture and 2,048 tokens.
    """

    model: str
    precision: str
    needs_gb: float
    device: str | None
    how: str


def report(cache: Path | None = None) -> dict[str, Any]:
    """All that ``cogvlm doctor`` says, ready for JSON."""
    cache = cache or hub.cache_dir()
    devices = find_devices()
    language = os.environ.get("COGVLM_LANGUAGE_MODEL")
    ready = language if language else hub.language_model_ready(cache)
    return {
        "versions": versions(),
        "devices": [asdict(device) for device in devices],
        "models": [asdict(fit) for fit in fits(devices)],
        "cache": str(cache),
        "language_model": None if ready is None else str(ready),
    }


def versions() -> dict[str, str]:
    """Version of each part, ``missing`` where it is not installed."""
    found = {"cogvlm": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def fits(devices: list[Device]) -> list[Fit]:
    """What ``--precision auto`` makes of nano and of CogVLM2 on ``devices``."""
    from .config import preset
    from .memory import MIXES, choose, needs

    found = []
    for model, name, how in _MODELS:
        wanted = needs(preset(name))
        chosen = choose(wanted, devices)
        kinds = [precision for d in devices for precision in MIXES[d.kind]]
        precision = chosen[1] if chosen else min(kinds, key=wanted.__getitem__)
        where = chosen[0].name if chosen else None
        if precision.startswith("int") and not _installed("torchao"):
            how += "; needs the extra 'quant': pip install 'cogvlm[quant]'"
        found.append(Fit(model, precision, wanted[precision] / 1e9, where, how))
    return found


_MODELS = (
    ("nano", "nano", "cogvlm ask PICTURE QUESTION"),
    ("CogVLM2 19B", "cogvlm2", "cogvlm ask --model FOLDER PICTURE QUESTION"),
)


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
