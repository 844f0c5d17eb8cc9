"""From conversations and pictures to the model's input, without torch.

``messages`` (values) -> ``template`` (segments) -> ``encode`` (ids, types, pixels, labels), with
``image`` and ``tokenizer`` as the two leaves.
"""

from __future__ import annotations

from .encode import Batch, Encoded, Processor
from .image import ImageLimits, NativePixels, Pixels, SquarePixels, load_image, pixels_from_dict
from .messages import (
    Image,
    Message,
    Text,
    Video,
    assistant,
    check_order,
    parse_messages,
    system,
    user,
)
from .template import TEMPLATES, Template, get_template
from .tokenizer import Detokenizer, FastTokenizer, Tokenizer, open_tokenizer
from .video import FramePixels, VideoLimits, VideoPlan, load_video

__all__ = [
    "TEMPLATES",
    "Batch",
    "Detokenizer",
    "Encoded",
    "FastTokenizer",
    "FramePixels",
    "Image",
    "ImageLimits",
    "Message",
    "NativePixels",
    "Pixels",
    "Processor",
    "SquarePixels",
    "Template",
    "Text",
    "Tokenizer",
    "Video",
    "VideoLimits",
    "VideoPlan",
    "assistant",
    "check_order",
    "get_template",
    "load_image",
    "load_video",
    "open_tokenizer",
    "parse_messages",
    "pixels_from_dict",
    "system",
    "user",
]
