"""Films -> frames -> pixels: which frames are taken, how a file is read, and the pixel plan.

``T`` frames, ``H, W`` pixels, ``S`` pixels a side of the square that the tower takes.  PyAV, which
decodes files, is the extra ``cogvlm[video]`` and is imported when a file is opened; frames that
are already pictures need nothing.

Two ways to choose frames, both of the released demonstration code (``video_demo``)::

    seconds   the frame nearest to 0 s, 1 s, 2 s, ... at most 24     numbered 0, 1, 2 in the prompt
    uniform   24 frames evenly over the first 60 s                   not numbered
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..errors import ConfigError, ImageError
from .image import MEAN, STD, ImageLimits, SquarePixels, decoding, first_line, load_image
from .messages import VideoSource

Frame = NDArray[np.uint8]  # uint8[H, W, 3], RGB

# Playlists and lists of files are left out: they make the decoder open what they name.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,obu,flv,asf,"
    "ogg,gif,mxf,nut"
)


@dataclass(frozen=True)
class VideoPlan:
    """Which frames of a film a model sees.

    Raises:
        ConfigError: an unknown choice, or a number below 1.
    """

    choice: Literal["seconds", "uniform"] = "seconds"
    frames: int = 24  # at most
    seconds: int = 60  # from the start, for choice="uniform"

    def __post_init__(self) -> None:
        if self.choice not in ("seconds", "uniform"):
            raise ConfigError(f"choice {self.choice!r} is not known; known: seconds, uniform")
        for name in ("frames", "seconds"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least 1")

    @property
    def numbered(self) -> bool:
        """Whether every frame is followed by its number as text."""
        return self.choice == "seconds"

    @classmethod
    def of_template(cls, name: str) -> VideoPlan:
        """The plan that goes with a released template: ``chat`` was trained on seconds."""
        return cls("seconds" if name == "chat" else "uniform")


@dataclass(frozen=True)
class VideoLimits:
    """What a film may cost; frames beyond those that a plan looks at are never decoded."""

    max_bytes: int = 2**31
    max_seconds: float = 4 * 3600.0  # as the file states it
    max_decoded: int = 20_000  # frames gone through to find those of the plan
    max_pixels: int = 7680 * 4320  # width x height of a frame


# --- choosing frames -------------------------------------------------------------------------


def nearest_to_seconds(times: Sequence[float], most: int) -> list[int]:
    """Index of the frame nearest to every whole second, the earlier of two equally near.

    The seconds go from 0 to the time of the last frame, rounded (halves to even).

    Args:
        times: seconds since the first frame, in order.
        most: longest result.

    >>> nearest_to_seconds([0.0, 0.4, 0.8, 1.2, 1.6], 24)
    [0, 2, 4]
    """
    return [i for i, _ in _nearest(enumerate(times), most)]


def _nearest(timed: Iterator[tuple[int, float]], most: int) -> Iterator[tuple[int, float]]:
    """Pass on the items ``(_, time)`` nearest to 0, 1, 2, ... seconds, some of them twice."""
    second, last = 0, None
    for item in timed:
        while second < most and item[1] >= second:
            earlier = last is not None and second - last[1] <= item[1] - second
            yield last if earlier and last is not None else item
            second += 1
        if second == most:
            return
        last = item
    if last is not None and second <= round(last[1]):
        yield last


def evenly(count: int, rate: float | None, plan: VideoPlan) -> list[int]:
    """Indices of ``plan.frames`` frames evenly over the first ``plan.seconds``, rounded down.

    A film of fewer frames repeats some.

    Args:
        count: frames of the film.
        rate: frames a second on average; ``None`` takes the whole film.
        plan: how many frames over how many seconds.

    >>> evenly(5, 25.0, VideoPlan("uniform", frames=4))
    [0, 1, 2, 4]
    """
    end = count if rate is None else min(count, max(1, int(plan.seconds * rate)))
    return [int(i) for i in np.linspace(0, end - 1, plan.frames, dtype=int)]


# --- reading ---------------------------------------------------------------------------------


def load_video(
    source: VideoSource, plan: VideoPlan, limits: VideoLimits | None = None
) -> list[Frame]:
    """The frames of a film that ``plan`` chooses, upright: ``uint8[H, W, 3]`` each.

    Frames given as pictures are taken as they are, all of them.

    Args:
        source: path, bytes of a file, open binary file, or a tuple of pictures.
        plan: which frames.
        limits: :class:`VideoLimits`.

    Raises:
        ImageError: missing, unreadable, empty, broken, without pictures, over a limit, more
            pictures than the plan has frames, or PyAV is not installed.
    """
    limits = limits or VideoLimits()
    if isinstance(source, tuple):
        return _pictures(source, plan, limits)
    with _opened(source, limits) as (file, name), decoding(name, "broken, cut off or no video"):
        return _read(file, name, plan, limits)


def _pictures(
    source: Sequence[PILImage.Image], plan: VideoPlan, limits: VideoLimits
) -> list[Frame]:
    if len(source) > plan.frames:
        raise ImageError(
            f"the video is given as {len(source)} frames, this model takes at most {plan.frames}; "
            "choose among them"
        )
    return [np.asarray(load_image(frame, ImageLimits(limits.max_pixels))) for frame in source]


@contextmanager
def _opened(source: Any, limits: VideoLimits) -> Iterator[tuple[Any, str]]:
    """A seekable binary file and what to call it."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        name = f"video {str(path)!r}"
        if not path.is_file():
            why = "is no regular file" if path.exists() else "does not exist"
            raise ImageError(f"{name} {why}; check the path")
        try:
            with path.open("rb") as file:
                _check_size(path.stat().st_size, name, limits)
                yield file, name
        except OSError as exc:
            raise ImageError(f"{name} cannot be read ({first_line(exc)}); check it") from None
        return
    name = "video data"
    if hasattr(source, "read"):
        name = f"video file {getattr(source, 'name', type(source).__name__)!r}"
        try:
            if source.seekable():
                source.seek(0)
            source = source.read(limits.max_bytes + 1)
        except (OSError, ValueError, AttributeError) as exc:
            raise ImageError(f"{name} cannot be read ({first_line(exc)}); open it again") from None
    if not isinstance(source, bytes):
        raise ImageError(f"{name} is a {type(source).__name__}; give bytes, a path or frames")
    _check_size(len(source), name, limits)
    yield io.BytesIO(source), name


def _check_size(size: int, name: str, limits: VideoLimits) -> None:
    if not size:
        raise ImageError(f"{name} is empty; it was perhaps not written or downloaded fully")
    if size > limits.max_bytes:
        raise ImageError(
            f"{name} has over {limits.max_bytes} bytes, the limit; cut it, or raise "
            "VideoLimits.max_bytes"
        )


def _read(file: Any, name: str, plan: VideoPlan, limits: VideoLimits) -> list[Frame]:
    if plan.choice == "seconds":
        with _film(file, name, limits) as (container, stream):
            timed = _timed(container, stream, name, limits)
            frames = [_upright(frame) for frame, _ in _nearest(timed, plan.frames)]
    else:
        with _film(file, name, limits) as (container, stream):
            wanted = _wanted(container, stream, plan, limits)
        file.seek(0)
        with _film(file, name, limits) as (container, stream):
            frames = _take(_timed(container, stream, name, limits), wanted)
    if not frames:
        raise ImageError(f"{name} has no frame; save or download it again")
    return frames


@contextmanager
def _film(file: Any, name: str, limits: VideoLimits) -> Iterator[tuple[Any, Any]]:
    """The opened container and its film, its size and length checked."""
    try:
        import av
    except ImportError:
        raise ImageError(
            f"{name}: reading videos needs PyAV; install it with: pip install 'cogvlm[video]'"
        ) from None
    with av.open(file, options={"format_whitelist": _CONTAINERS}) as container:
        films = [
            s
            for s in container.streams.video
            # The cover of a piece of music is stored as a film of one frame.
            if not s.disposition & av.stream.Disposition.attached_pic
        ]
        if not films:
            sound = ", only sound" if container.streams.audio else " (perhaps it is cut off)"
            raise ImageError(f"{name} has no film in it{sound}; give a video file")
        stream = films[0]
        if stream.width * stream.height > limits.max_pixels:
            raise ImageError(
                f"{name} has {stream.width}x{stream.height} pixels a frame, over the limit of "
                f"{limits.max_pixels}; scale it down or raise VideoLimits.max_pixels"
            )
        length = (container.duration or 0) / av.time_base
        if length > limits.max_seconds:
            raise ImageError(
                f"{name} is {length:.0f} s long, over the limit of {limits.max_seconds:.0f} s; "
                "cut it, or raise VideoLimits.max_seconds"
            )
        stream.thread_type = "AUTO"
        yield container, stream


def _timed(
    container: Any, stream: Any, name: str, limits: VideoLimits
) -> Iterator[tuple[Any, float]]:
    """Decoded frames and their seconds since the first one."""
    start = None
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    for i, frame in enumerate(container.decode(stream)):
        if i >= limits.max_decoded:
            raise ImageError(
                f"{name}: {limits.max_decoded} frames decoded, the limit, and the last one wanted "
                "is not among them; lower its frame rate or raise VideoLimits.max_decoded"
            )
        time = i / rate if frame.time is None else frame.time
        start = time if start is None else start
        yield frame, float(time - start)


def _wanted(container: Any, stream: Any, plan: VideoPlan, limits: VideoLimits) -> list[int]:
    """Indices of the frames of an even choice; packets are counted, nothing is decoded."""
    rate = float(stream.average_rate) if stream.average_rate else None
    most = limits.max_decoded if rate is None else max(1, int(plan.seconds * rate))
    packets = (packet for packet in container.demux(stream) if packet.size)
    count = sum(1 for _ in islice(packets, most))
    return evenly(count, rate, plan) if count else []


def _take(timed: Iterator[tuple[Any, float]], wanted: Sequence[int]) -> list[Frame]:
    """The frames at these increasing indices, the last frame for any past the end."""
    taken: list[Frame] = []
    last = None
    for i, (frame, _) in enumerate(timed):
        last = frame
        while len(taken) < len(wanted) and wanted[len(taken)] == i:
            again = taken and wanted[len(taken) - 1] == i
            taken.append(taken[-1] if again else _upright(frame))
        if len(taken) == len(wanted):
            return taken
    if last is not None:
        taken += [_upright(last)] * (len(wanted) - len(taken))
    return taken


def _upright(frame: Any) -> Frame:
    values: Frame = frame.to_ndarray(format="rgb24")
    # Telephones store films lying and say so; the angle is counted counter-clockwise.
    return np.ascontiguousarray(np.rot90(values, round(frame.rotation / 90) % 4))


# --- pixels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FramePixels(SquarePixels):
    """The released plan of the video models: normalise, scale the short side, crop the middle.

    The scaling is bilinear between pixel centres without smoothing, in floating point; the long
    side is rounded down, and the offset of the crop to the nearest whole number (halves to even).

    Raises:
        ConfigError: a number below 1, or a size that is no multiple of ``patch * merge``.
    """

    size: int = 224  # pixels a side

    def __call__(self, image: PILImage.Image) -> NDArray[np.float32]:
        """Pixels ``float32[3, size, size]`` of an RGB image, normalised as CLIP's."""
        if image.mode != "RGB":
            raise ImageError(f"a pixel plan needs an RGB image, got {image.mode}; use load_image")
        return self.frame(np.asarray(image))

    def frame(self, frame: Frame) -> NDArray[np.float32]:
        """Pixels ``float32[3, size, size]`` of a frame ``uint8[H, W, 3]``."""
        height, width = frame.shape[:2]
        short = min(height, width)
        top, bottom, down = _blend(height, math.floor(height / short * self.size), self.size)
        left, right, along = _blend(width, math.floor(width / short * self.size), self.size)

        def corner(rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float32]:
            chosen = frame[rows][:, columns].astype(np.float32) / np.float32(255)
            return np.asarray((chosen - MEAN) / STD, np.float32)

        along, down = along[None, :, None], down[:, None, None]
        above = corner(top, left) * (1 - along) + corner(top, right) * along
        below = corner(bottom, left) * (1 - along) + corner(bottom, right) * along
        values = above * (1 - down) + below * down  # [S, S, 3]
        return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)


def _blend(
    before: int, after: int, size: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """One side of ``before`` pixels scaled to ``after``, of which the middle ``size`` are kept.

    Returns:
        For every kept pixel its two neighbours and the weight of the second: ``[size]`` each.
    """
    kept = np.arange(size, dtype=np.float32) + np.float32(round((after - size) / 2))
    scale = np.float32(before) / np.float32(after)
    place = np.maximum(scale * (kept + np.float32(0.5)) - np.float32(0.5), np.float32(0))
    first = place.astype(np.intp)
    weight = place - first.astype(np.float32)
    return first, np.minimum(first + 1, before - 1), weight
