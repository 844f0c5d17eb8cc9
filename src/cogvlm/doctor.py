"""What is installed, what this machine has, and what would run on it.

Loads no model. Imports torch when called.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, hub

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "Pillow")


@dataclass(frozen=True)
class Device:
    """Where a model can run; ``memory_gb`` (10**9 bytes) is ``None`` where nothing tells.

    ``precision`` is what ``--precision auto`` takes there, ``advice`` what to know about it.
    """

    name: str
    kind: str  # cpu | cuda | mps
    memory_gb: float | None
    precision: str = "float32"
    advice: str = ""


@dataclass(frozen=True)
class Fit:
    """Whether a model runs here: ``device`` is ``None`` where it does not."""

    model: str
    precision: str
    needs_gb: float
    device: str | None
    how: str


# Memory of the 19B checkpoint as measured by its authors for one 1344-pixel image: 42 GB in
# bfloat16, 16 GB in int4.
_MODELS = (
    ("nano", "float32", 2.0, "cogvlm ask PICTURE QUESTION"),
    ("CogVLM2 19B", "bfloat16", 42.0, "cogvlm ask --model FOLDER --precision bfloat16 ..."),
    ("CogVLM2 19B", "int4", 16.0, "cogvlm ask --model FOLDER --precision int4 ..."),
)


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


def find_devices() -> list[Device]:
    """The accelerators that torch sees, the CPU last."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        # Cards before compute capability 8 do bfloat16 in software.
        advice = "" if card.major >= 8 else "slow on this card, take --precision float16"
        size = card.total_memory / 1e9
        devices.append(Device(f"cuda:{index} {card.name}", "cuda", size, "bfloat16", advice))
    memory = _main_memory()
    if torch.backends.mps.is_available():
        devices.append(Device("mps (shares the main memory)", "mps", memory, "bfloat16"))
    cpu = f"cpu {platform.machine()}, {os.cpu_count()} cores"
    return [*devices, Device(cpu, "cpu", memory)]


def fits(devices: list[Device]) -> list[Fit]:
    """Which models run on which of ``devices``, the first that has the memory."""
    found = []
    for model, precision, needs, how in _MODELS:
        able = [d for d in devices if d.memory_gb is not None and d.memory_gb >= needs]
        if precision == "int4":
            able = [d for d in able if d.kind != "mps"]  # no kernel there
        found.append(Fit(model, precision, needs, able[0].name if able else None, how))
    return found


def _main_memory() -> float | None:
    """Main memory in GB."""
    if sys.platform == "win32":
        return _windows_memory()
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (ValueError, OSError):
        return None


def _windows_memory() -> float | None:
    import ctypes

    kilobytes = ctypes.c_ulonglong(0)
    ask = ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory  # type: ignore[attr-defined]
    return kilobytes.value * 1024 / 1e9 if ask(ctypes.byref(kilobytes)) else None
