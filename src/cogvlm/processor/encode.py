"""Messages -> the model's input: ids, token types, pixels, labels.

``L`` tokens, ``B`` rows, ``H, W`` pixels.  A row of a released template::

    ids    bos  i i i i i i  Q : ...      i = image token: begin marker, patches, end marker
    types   0   1 1 1 1 1 1  0 0 ...

Knows nothing about models.  Source of the layout: the conversation builder of the released
CogVLM2 code; unlike there, several images are possible and the tokenizer is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image as PILImage

from ..errors import CheckpointError, ConfigError, InputError, MessageError, refuse_unknown
from .image import ImageLimits, Pixels, SquarePixels, load_image, pixels_from_dict
from .lines import LinePixels, Straight, asks_for_places, joined, read_out
from .messages import Image, ImageSource, Message, Text, Video
from .template import BOS, EOS, ImageSlot, Plain, Segment, Special, Template, get_template
from .tokenizer import Tokenizer, read_json, tokenizer_of
from .video import FramePixels, VideoLimits, VideoPlan, load_video

LANGUAGE = 0
IMAGE = 1
IGNORED = -100
_VIDEO = "CogVLMVideoForCausalLM"  # the class that takes videos, told by its name alone
_GLM = "multi_query_group_num"  # a key that of this family only GLM-4V has

Ids = NDArray[np.int64]
Strips: TypeAlias = Sequence[NDArray[np.float32]]  # float32[3, H, W] each
Reader: TypeAlias = Callable[[Strips], list[str]]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row."""

    input_ids: Ids  # int64[L]
    token_type_ids: Ids  # int64[L]; 0 language, 1 image
    # float32[3, H, W] each, in the order of the blocks; frames of a video are blocks too.
    pixel_values: list[NDArray[np.float32]]
    labels: Ids | None = None  # int64[L]; -100 outside answers; None unless for training
    cross_pixel_values: list[NDArray[np.float32]] | None = None  # CogAgent: the same, large


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one length, padded on the left."""

    input_ids: Ids  # int64[B, L]
    token_type_ids: Ids  # int64[B, L]; padding is 0
    attention_mask: Ids  # int64[B, L]; 1 real, 0 padding
    pixel_values: list[NDArray[np.float32]]  # float32[3, H, W] each, in row order
    image_counts: tuple[int, ...]  # images of each row
    labels: Ids | None = None  # int64[B, L]; padding is -100
    cross_pixel_values: list[NDArray[np.float32]] | None = None  # CogAgent: the same, large


@dataclass(frozen=True)
class Processor:
    """Tokenizer, prompt format and pixel plan of one model.

    Raises:
        ConfigError: the template needs a token that the tokenizer does not have, or videos are
            taken but ``pixels`` is not :class:`FramePixels`.
    """

    tokenizer: Tokenizer
    template: Template
    pixels: Pixels
    image_token_id: int  # stands at every place of an image block
    max_images: int | None = None  # in one conversation; None: as many as fit
    language: str | None = None  # language tag of what the model was trained to read, if stated
    limits: ImageLimits = field(default_factory=ImageLimits)
    video: VideoPlan | None = None  # which frames of a video are taken; None: takes no videos
    video_limits: VideoLimits = field(default_factory=VideoLimits)
    cross_pixels: Pixels | None = None  # CogAgent: plan of the large copy of every picture
    # What strips float32[3, H, W] say, for a plan that has them read: a head of the model.
    reader: Reader | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in self.template.specials:
            if self.tokenizer.token_id(name) is None:
                raise ConfigError(
                    f"template {self.template.name!r} needs the token {name!r}, which the "
                    "tokenizer does not have; use another template or add the token"
                )
        if self.video is not None and not isinstance(self.pixels, FramePixels):
            raise ConfigError(
                f"a video model's pixels are {type(self.pixels).__name__}; give FramePixels"
            )

    @classmethod
    def from_folder(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> Processor:
        """Build the processor of a model's folder.

        ``processor.json`` decides where it is present: ``template``, ``pixels`` (``kind`` and the
        fields of the plan), ``image_token`` (a string), ``language`` and ``max_images``
        (optional).  Else ``config.json`` in the released layout does: ``template_version``,
        ``vision_config`` and ``pad_token_id``, which is the image placeholder there.

        Args:
            folder: the folder on disk.
            tokenizer: instead of the folder's; see :func:`tokenizer_of` for where it is looked
                for otherwise.

        Raises:
            CheckpointError: a file is missing or damaged.
            ConfigError: an unknown key or an impossible value.
        """
        folder = Path(folder)
        own, config = read_json(folder / "processor.json"), read_json(folder / "config.json")
        if own is None and config is None:
            raise CheckpointError(
                f"{folder} has neither processor.json nor config.json; give a model's folder"
            )
        tokenizer = tokenizer or tokenizer_of(folder, config or {})
        if own is not None:
            return cls(tokenizer, **_from_processor_json(own, tokenizer, folder / "processor.json"))
        assert config is not None
        return cls(tokenizer, **_from_config_json(config, tokenizer, folder / "config.json"))

    def encode(self, messages: Sequence[Message], train: bool = False) -> Encoded:
        """Encode a conversation; with ``train`` it ends with an answer, and has labels.

        Raises:
            MessageError: wrong order, too many images, a video for a model that takes none, or
                nothing to encode.
            ImageError: a picture or video cannot be read.
        """
        self._check_videos(messages)
        segments = self.template.segments(messages, train)
        self._check_count(sum(isinstance(s, ImageSlot) for s in segments))
        ids: list[int] = []
        types: list[int] = []
        labels: list[int] = []
        pixel_values: list[NDArray[np.float32]] = []
        large: list[NDArray[np.float32]] = []
        placed = asks_for_places(asked(messages))
        for segment in self._expand(segments, placed):
            if isinstance(segment, ImageSlot):
                image = self._image(segment)
                pixel_values.append(self.pixels(image))
                if self.cross_pixels is not None:
                    large.append(self.cross_pixels(image))
                count = self.pixels.tokens(*self.pixels.grid(*image.size))
                new, kind, labelled = [self.image_token_id] * count, IMAGE, False
            else:
                new, kind, labelled = self.words(segment), LANGUAGE, segment.labelled
            ids += new
            types += [kind] * len(new)
            labels += new if labelled else [IGNORED] * len(new)
        if not ids:
            raise MessageError("the conversation has no token; give it a text or an image")
        return Encoded(
            _int64(ids),
            _int64(types),
            pixel_values,
            _int64(labels) if train else None,
            None if self.cross_pixels is None else large,
        )

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """Join rows to a batch, padded on the left.

        Raises:
            InputError: no rows, or labels on some rows only.
        """
        if not rows:
            raise InputError("a batch needs at least one row; got none")
        labelled = [row.labels for row in rows if row.labels is not None]
        if labelled and len(labelled) != len(rows):
            raise InputError(
                f"{len(labelled)} of {len(rows)} rows have labels; encode all of them with the "
                "same train"
            )
        pad = self.tokenizer.pad_id
        return Batch(
            input_ids=_pad(
                [r.input_ids for r in rows], self.image_token_id if pad is None else pad
            ),
            token_type_ids=_pad([r.token_type_ids for r in rows], LANGUAGE),
            attention_mask=_pad([np.ones_like(r.input_ids) for r in rows], 0),
            pixel_values=[image for row in rows for image in row.pixel_values],
            image_counts=tuple(len(row.pixel_values) for row in rows),
            labels=_pad(labelled, IGNORED) if labelled else None,
            cross_pixel_values=None
            if self.cross_pixels is None
            else [image for row in rows for image in row.cross_pixel_values or ()],
        )

    def decode(self, ids: ArrayLike) -> str:
        """Text of generated ids, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in np.asarray(ids).reshape(-1)])

    def _check_count(self, images: int) -> None:
        if self.max_images is not None and images > self.max_images:
            raise MessageError(
                f"the conversation has {images} images, this model takes at most "
                f"{self.max_images}; leave out {images - self.max_images}"
            )

    def _check_videos(self, messages: Sequence[Message]) -> None:
        if self.video is None and any(isinstance(p, Video) for m in messages for p in m.parts):
            raise MessageError(
                "the conversation has a video, and this model takes pictures only; models of the "
                "class CogVLMVideoForCausalLM (CogVLM2-Video, cogvlm2-llama3-caption) take videos"
            )

    def _expand(self, segments: Sequence[Segment], placed: bool) -> Iterator[Segment]:
        """For a video model, the frames of every film, numbered where its plan says so; a picture
        is a film of one frame there.  For one that reads lines, the pieces of every picture, with
        their places or without.
        """
        for segment in segments:
            if isinstance(segment, ImageSlot) and isinstance(self.pixels, LinePixels):
                yield from self._pieces(self._image(segment), self.pixels, placed)
                continue
            if self.video is None or not isinstance(segment, ImageSlot):
                yield segment
                continue
            for i, frame in enumerate(self._frames(segment.image, self.video)):
                yield ImageSlot(frame)
                if self.video.numbered:
                    yield Plain(str(i))

    def _pieces(self, image: PILImage.Image, plan: LinePixels, placed: bool) -> Iterator[Segment]:
        """The pieces of a picture, shown or read or both, and what stands between them."""
        straight = plan.cut(image, placed)
        texts: Sequence[str | None] = [None] * len(straight.pieces)
        if plan.shown is not None:
            texts = self._texts(straight, plan)
        shown = len(straight.pieces[: plan.shown])
        for number, (text, piece) in enumerate(zip(texts, straight.pieces, strict=True)):
            if number < shown:
                yield ImageSlot(Image(straight.crop(piece)))
            if behind := read_out(text, piece.behind, piece.place):
                yield Plain(behind)

    def transcribe(self, source: ImageSource) -> str:
        """The print in a picture as the model's own head reads it; no language model is asked.

        Lines end with a newline; parts of a line that stand apart have a tab between them.

        Raises:
            ConfigError: the model has no such head, or this processor is not of a loaded one.
            ImageError: the picture cannot be read.
        """
        plan = self.pixels
        if not isinstance(plan, LinePixels) or plan.shown is None:
            raise ConfigError("this model has no head that reads lines of print; ask it instead")
        straight = plan.cut(load_image(source, self.limits), placed=False)
        return joined(self._texts(straight, plan), [p.behind for p in straight.pieces])

    def _texts(self, straight: Straight, plan: LinePixels) -> list[str]:
        """What each piece of a picture says."""
        return self.read([plan(straight.crop(piece)) for piece in straight.pieces])

    def read(self, strips: Strips) -> list[str]:
        """What strips say.

        Raises:
            ConfigError: nobody can read them.
        """
        if self.reader is None:
            raise ConfigError(
                "this model's own head reads the lines of pictures, and this processor has none; "
                "take that of cogvlm.open_model(...)"
            )
        return self.reader(strips)

    def _frames(self, shown: Image | Video, plan: VideoPlan) -> list[Image]:
        if isinstance(shown, Image):
            return [shown]
        frames = load_video(shown.source, plan, self.video_limits)
        return [Image(PILImage.fromarray(frame)) for frame in frames]

    def _image(self, slot: ImageSlot) -> PILImage.Image:
        assert isinstance(slot.image, Image)  # films are expanded or refused before
        return load_image(slot.image.source, self.limits)

    def words(self, segment: Plain | Special) -> list[int]:
        """Ids of a piece of text, or of a special token.

        Raises:
            ConfigError: the tokenizer does not have the token.
        """
        if isinstance(segment, Plain):
            return self.tokenizer.encode(segment.text)
        if segment.token == BOS:
            return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        if segment.token == EOS:
            found = self.tokenizer.eos_id
        else:
            found = self.tokenizer.token_id(segment.token)
        if found is None:
            raise ConfigError(f"the tokenizer has no {segment.token} token; set its {EOS}_id")
        return [found]


def asked(messages: Sequence[Message]) -> list[str]:
    """The texts of all questions."""
    return [
        part.text
        for message in messages
        if message.role == "user"
        for part in message.parts
        if isinstance(part, Text)
    ]


def _int64(values: list[int]) -> Ids:
    return np.array(values, dtype=np.int64)


def _pad(rows: Sequence[Ids], value: int) -> Ids:
    out = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[len(target) - len(row) :] = row
    return out


def _from_processor_json(
    values: Mapping[str, Any], tokenizer: Tokenizer, path: Path
) -> dict[str, Any]:
    optional = {"language": str, "max_images": int}
    needed = ("template", "pixels", "image_token")
    refuse_unknown(values, (*needed, *optional), str(path))
    for key in needed:
        if key not in values:
            raise ConfigError(f"{path} has no {key!r}; add it")
    for key, kind in optional.items():
        value = values.get(key)
        if value is not None and type(value) is not kind:
            raise ConfigError(f"{path}: {key} is {value!r}; give {kind.__name__} or leave it out")
    image_token_id = tokenizer.token_id(str(values["image_token"]))
    if image_token_id is None:
        raise ConfigError(
            f"{path}: image_token {values['image_token']!r} is not in the tokenizer; "
            "use the tokenizer that came with the model"
        )
    return {
        "template": _template(values["template"], path),
        "pixels": pixels_from_dict(values["pixels"], f"{path}: pixels", {"lines": LinePixels}),
        "image_token_id": image_token_id,
        **{key: values[key] for key in optional if key in values},
    }


def _from_config_json(
    config: Mapping[str, Any], tokenizer: Tokenizer, path: Path
) -> dict[str, Any]:
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping) or not {"image_size", "patch_size"} <= vision.keys():
        raise ConfigError(f"{path}: vision_config needs image_size and patch_size; add them")
    placeholder = config.get("pad_token_id")
    if placeholder is None:
        placeholder = tokenizer.pad_id
    if type(placeholder) is not int:
        raise ConfigError(f"{path} has no pad_token_id, the image placeholder; add it")
    plan = {"size": vision["image_size"], "patch": vision["patch_size"]}
    large = config.get("cross_image_size")
    # CogAgent's "chat" is another format under the same name.
    family = "" if large is None else "cogagent-"
    usual = "glm4" if _GLM in config else "chat"
    template = _template(f"{family}{config.get('template_version', usual)}", path)
    video = None
    kind: type[SquarePixels] = SquarePixels
    if _VIDEO in (config.get("architectures") or ()):
        video, kind = VideoPlan.of_template(template.name), FramePixels
    try:
        pixels = kind(**plan, merge=_merge(config, vision, path))
        # Any patch divides here: the encoder of the large copy knows its own.
        cross = None if large is None else SquarePixels(large, patch=1, merge=1)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from None
    return {
        "template": template,
        "pixels": pixels,
        "image_token_id": placeholder,
        "video": video,
        "max_images": None if large is None else 1,
        "cross_pixels": cross,
    }


def _merge(config: Mapping[str, Any], vision: Mapping[str, Any], path: Path) -> int:
    for key, usual in (("grid", "square"), ("adapter_merge", [2, 2])):
        if vision.get(key, usual) != usual:
            raise ConfigError(f"{path}: {key} {vision[key]!r} needs a processor.json; add one")
    # The released files do not say: the convolution came with the grouped queries of CogVLM2.
    later = "num_multi_query_heads" in config or _GLM in config
    released = "conv_glu" if later else "linear_glu"
    adapter = vision.get("adapter", released)
    merges = {"conv_glu": 2, "linear_glu": 1}
    if adapter not in merges:
        raise ConfigError(
            f"{path}: adapter {adapter!r} needs another pixel plan; known: conv_glu, linear_glu"
        )
    return merges[adapter]


def _template(name: Any, path: Path) -> Template:
    try:
        return get_template(str(name))
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from None
