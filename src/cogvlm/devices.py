"""Where a model can run, and how much memory is free there.  Imports torch when called."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Device:
    """Where a model can run; memory in 10**9 bytes, ``None`` where nothing tells.

    ``name`` begins with what torch calls it; ``advice`` is what to know about it; ``free_gb`` is
    ``None`` where all of it counts as free.
    """

    name: str
    kind: str  # cpu | cuda | mps
    memory_gb: float | None
    advice: str = ""
    free_gb: float | None = None

    @property
    def place(self) -> str:
        """What torch calls it."""
        return self.name.split()[0]

    @property
    def room(self) -> float:
        """Free bytes; none where nothing tells."""
        free = self.memory_gb if self.free_gb is None else self.free_gb
        return 0.0 if free is None else free * 1e9


def find_devices() -> list[Device]:
    """The accelerators that torch sees, the CPU last."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        # Cards before compute capability 8 do bfloat16 in software.
        advice = "" if card.major >= 8 else "bfloat16 is slow there, take --precision float16"
        free, total = torch.cuda.mem_get_info(index)
        name = f"cuda:{index} {card.name}"
        devices.append(Device(name, "cuda", total / 1e9, advice, free / 1e9))
    total, free = main_memory()
    if torch.backends.mps.is_available():
        # It shares the main memory, and is given a part of it.
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        shared = "mps (shares the main memory)"
        devices.append(Device(shared, "mps", total / 1e9, "", min(free, left) / 1e9))
    cpu = f"cpu {platform.machine()}, {os.cpu_count()} cores"
    return [*devices, Device(cpu, "cpu", total / 1e9, "", free / 1e9)]


def main_memory() -> tuple[int, int]:
    """Main memory and what is free of it in bytes, or of the container's share of it."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for limit, used, stat in _CONTAINER:
        try:
            share = int(limit.read_text())
            fields = dict(line.split() for line in stat.read_text().splitlines())
            # What files occupy is given up when it is needed.
            taken = int(used.read_text()) - int(fields.get("inactive_file", 0))
        except (OSError, ValueError):  # no such limit here, or "max"
            continue
        total, free = min(total, share), min(free, max(0, share - taken))
    return total, free


_CGROUP = Path("/sys/fs/cgroup")
_CONTAINER = (  # version 2 and 1 of control groups: limit, use, and what the use is of
    tuple(_CGROUP / name for name in ("memory.max", "memory.current", "memory.stat")),
    tuple(
        _CGROUP / "memory" / name
        for name in ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    ),
)
