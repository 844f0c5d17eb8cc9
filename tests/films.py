"""Films for the tests: written by PyAV, lossless, so that every frame comes back as it was."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray


def flat(values: Sequence[int], width: int = 32, height: int = 24) -> NDArray[np.uint8]:
    """One grey frame for every value: ``uint8[T, H, W, 3]``."""
    return np.stack([np.full((height, width, 3), v, dtype=np.uint8) for v in values])


def film(
    frames: NDArray[np.uint8],
    rate: int = 5,
    times: Sequence[float] | None = None,
    container: str = "matroska",
    codec: str = "ffv1",
    pixels: str = "bgr0",
) -> bytes:
    """A file of these frames, ``rate`` a second or at ``times`` (seconds)."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(values, format="rgb24").reformat(format=pixels)
            frame.time_base = Fraction(1, 1000)
            frame.pts = round(1000 * (times[i] if times is not None else i / rate))
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def mp4(frames: NDArray[np.uint8], rate: int = 5) -> bytes:
    """The same as MPEG-4 in an mp4 file, which loses a little."""
    return film(frames, rate, container="mp4", codec="mpeg4", pixels="yuv420p")


def turned(data: bytes) -> bytes:
    """An mp4 file whose header says that the film stands on its side, as telephones write it."""
    at = data.index(b"tkhd") + 4 + 40  # version and flags, times, id, length, layer, volume

    def fixed(*numbers: float) -> bytes:
        scales = (16, 16, 30) * 3
        return b"".join(
            round(n * 2**s).to_bytes(4, "big", signed=True)
            for n, s in zip(numbers, scales, strict=True)
        )

    assert data[at : at + 36] == fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return data[:at] + fixed(0, 1, 0, -1, 0, 0, 0, 0, 1) + data[at + 36 :]


def sound() -> bytes:
    """A file of sound alone."""
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 8000
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()
