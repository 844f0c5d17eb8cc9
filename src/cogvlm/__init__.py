"""The CogVLM family as maintained software.

Importing this costs nothing: a name brings its module, and with it torch where needed, when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import CogVLMConfig as CogVLMConfig
    from .config import VisionConfig as VisionConfig
    from .config import preset as preset
    from .engine import Answer as Answer
    from .engine import GenerationSettings as GenerationSettings
    from .engine import complete as complete
    from .engine import run_file as run_file
    from .engine import stream as stream
    from .errors import CheckpointError as CheckpointError
    from .errors import CogVLMError as CogVLMError
    from .errors import ConfigError as ConfigError
    from .errors import DownloadError as DownloadError
    from .errors import ImageError as ImageError
    from .errors import InputError as InputError
    from .errors import MessageError as MessageError
    from .errors import RemoteError as RemoteError
    from .errors import ResourceError as ResourceError
    from .load import Loaded as Loaded
    from .load import load as open_model  # noqa: F401
    from .models.cogvlm import CogVLMForCausalLM as CogVLMForCausalLM
    from .processor import Image as Image
    from .processor import Message as Message
    from .processor import Processor as Processor
    from .processor import Text as Text
    from .processor import Video as Video
    from .processor import assistant as assistant
    from .processor import system as system
    from .processor import user as user

_HOMES = {
    "config": ("CogVLMConfig", "VisionConfig", "preset"),
    "engine": ("Answer", "GenerationSettings", "complete", "run_file", "stream"),
    "errors": (
        "CheckpointError",
        "CogVLMError",
        "ConfigError",
        "DownloadError",
        "ImageError",
        "InputError",
        "MessageError",
        "RemoteError",
        "ResourceError",
    ),
    "load": ("Loaded", "open_model"),
    "models.cogvlm": ("CogVLMForCausalLM",),
    "processor": ("Image", "Message", "Processor", "Text", "Video", "assistant", "system", "user"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
# `load` is the module; the function has a name of its own here.
_ORIGINAL = {"open_model": "load"}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), _ORIGINAL.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
