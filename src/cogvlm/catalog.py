"""The released checkpoints: what each is for, what its terms are, which configuration it has.

The terms are those of the licence of each family, read in its repository and on the pages of some
of its models, not on every page: where a page says something else (two of CogVLM's carry an
Apache-2.0 tag), the stricter is given.  None of it is legal advice, and terms change: the model's
page decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .config import FamilyConfig

OWNERS = ("THUDM", "zai-org")
"""The account on the model hub, formerly and now; the names are the same under both."""


@dataclass(frozen=True)
class Licence:
    """Terms of weights; ``commercial`` says what a company has to do."""

    name: str
    research: str
    commercial: str
    also: str = ""


_FREE = "free for academic research"
_REGISTER = "free of charge after registering at open.bigmodel.cn/mla/form"

COGVLM = Licence("CogVLM Model License", _FREE, _REGISTER)
COGVLM2 = Licence(
    "CogVLM2 License", _FREE, _REGISTER, "and the Meta Llama 3 Community License, it builds on it"
)
GLM4 = Licence(
    "glm-4-9b License", _FREE, _REGISTER, "show 'Built with glm-4'; derived models' names begin so"
)
COGAGENT = Licence("CogAgent License", _FREE, _REGISTER, "show 'Built with CogAgent'")


@dataclass(frozen=True)
class Checkpoint:
    """One released model.

    ``architecture`` names its configuration, ``changes`` what it has different; ``stored`` is the
    number format of its files: bfloat16, or fp4 (of bitsandbytes, tower and all).
    """

    name: str  # on the model hub, without the account
    architecture: str  # cogvlm | cogvlm2 | cogvlm2-video | cogagent | glm-4v
    licence: Licence
    purpose: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    stored: str = "bfloat16"

    @property
    def loadable(self) -> bool:
        """Whether this version reads its files."""
        return self.stored in ("bfloat16", "fp4")

    def config(self) -> FamilyConfig:
        """Its full-size configuration."""
        from .config import CogAgentConfig, Glm4vConfig, preset

        if self.architecture == "cogagent":
            return CogAgentConfig(**self.changes)
        if self.architecture == "glm-4v":
            return Glm4vConfig(**self.changes)
        return preset(self.architecture, **self.changes)


_224 = {"vision_config": {"image_size": 224, "num_positions": 257}}
_CHAT2 = "pictures of 1344 pixels, English"
_CHAT2_ZH = "pictures of 1344 pixels, Chinese and English"

CHECKPOINTS = (
    Checkpoint("cogvlm2-llama3-chat-19B", "cogvlm2", COGVLM2, _CHAT2),
    Checkpoint("cogvlm2-llama3-chinese-chat-19B", "cogvlm2", COGVLM2, _CHAT2_ZH),
    Checkpoint("cogvlm2-llama3-chat-19B-int4", "cogvlm2", COGVLM2, _CHAT2, stored="fp4"),
    Checkpoint("cogvlm2-llama3-chinese-chat-19B-int4", "cogvlm2", COGVLM2, _CHAT2_ZH, {}, "fp4"),
    Checkpoint("cogvlm2-video-llama3-chat", "cogvlm2-video", COGVLM2, "video, with times"),
    Checkpoint("cogvlm2-video-llama3-base", "cogvlm2-video", COGVLM2, "video, to train on"),
    Checkpoint("cogvlm2-llama3-caption", "cogvlm2-video", COGVLM2, "captions of videos"),
    Checkpoint("cogvlm-chat-hf", "cogvlm", COGVLM, "pictures of 490 pixels, dialogue"),
    Checkpoint("cogvlm-base-224-hf", "cogvlm", COGVLM, "pictures of 224 pixels, to train on", _224),
    Checkpoint("cogvlm-base-490-hf", "cogvlm", COGVLM, "pictures of 490 pixels, to train on"),
    Checkpoint("cogvlm-grounding-base-hf", "cogvlm", COGVLM, "boxes, to train on"),
    Checkpoint("cogvlm-grounding-generalist-hf", "cogvlm", COGVLM, "boxes around what is named"),
    Checkpoint("cogagent-chat-hf", "cogagent", COGVLM, "screens of 1120 pixels, dialogue, agent"),
    Checkpoint("cogagent-vqa-hf", "cogagent", COGVLM, "pictures of 1120 pixels, one question"),
    Checkpoint("glm-4v-9b", "glm-4v", GLM4, "pictures of 1120 pixels, Chinese and English"),
    Checkpoint("cogagent-9b-20241220", "glm-4v", COGAGENT, "screens of 1120 pixels, agent"),
)


def find(name: str) -> Checkpoint:
    """A checkpoint by its name, with or without one of :data:`OWNERS` before it.

    Raises:
        InputError: none of that name.

    >>> find("THUDM/cogvlm2-llama3-chat-19B").architecture
    'cogvlm2'
    """
    owner, slash, bare = name.rpartition("/")
    for checkpoint in CHECKPOINTS:
        if checkpoint.name == bare and (not slash or owner in OWNERS):
            return checkpoint
    raise InputError(f"no checkpoint {name!r} in the catalog; 'cogvlm models' lists them")
