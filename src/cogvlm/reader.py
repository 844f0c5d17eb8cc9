"""What the head of a model reads in the lines of pictures, remembered from turn to turn."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .processor.encode import Strips
from .processor.image import digest

_MOST = 16_384  # texts that are kept: a few megabytes


class StripReader:
    """Reads strips of print, each once; any number of threads may ask.

    Args:
        spell: strips ``float32[3, H, W]`` -> texts, see :meth:`cogvlm.models.vision.VisionModel`.
        most: texts that are remembered.
    """

    def __init__(self, spell: Callable[[Strips], list[str]], most: int = _MOST) -> None:
        self._spell, self._most = spell, most
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: Any, folder: Path) -> StripReader:
        """Of a model's own head.

        Raises:
            CheckpointError: it has none; ``folder`` is named.
        """
        vision = model.model.vision
        if not hasattr(vision, "ctc"):
            raise CheckpointError(
                f"{folder}: processor.json has the lines of pictures read (pixels.shown), but the "
                "model has no head for that (vision_config.ctc_hidden); remove the one or add the "
                "other"
            )
        return cls(vision.spell)

    def __call__(self, strips: Strips) -> list[str]:
        """The text of each strip."""
        keys = [digest(strip) for strip in strips]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
        fresh = {key: strip for key, strip in zip(keys, strips, strict=True) if key not in found}
        if fresh:
            found.update(zip(fresh, self._spell([*fresh.values()]), strict=True))
        with self._lock:
            self._known.update(found)
            for key in keys:
                self._known.move_to_end(key)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return [found[key] for key in keys]

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process remembers for itself."""
        return StripReader, (self._spell, self._most)
