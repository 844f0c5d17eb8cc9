"""Frame choice, reading of films, pixels and rows of video models against the recorded ones."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from safetensors.numpy import load_file

from cogvlm.errors import ConfigError, ImageError, MessageError
from cogvlm.processor import (
    FramePixels,
    Image,
    Message,
    Processor,
    SquarePixels,
    Video,
    VideoLimits,
    VideoPlan,
    assistant,
    get_template,
    load_video,
    parse_messages,
    system,
    user,
)
from cogvlm.processor.video import evenly, nearest_to_seconds
from films import film, flat, mp4, sound, turned
from processor.standin import Bytes

HERE = Path(__file__).parent
LAYOUTS = json.loads((HERE / "data" / "tokens.json").read_text())["layouts"]["cogvlm2_video"]
PIXELS = load_file(HERE.parent / "parity" / "cogvlm2_video" / "preprocess.safetensors")
SECONDS, UNIFORM = VideoPlan("seconds"), VideoPlan("uniform")


def processor(template: str = "chat", size: int = 224, **options: Any) -> Processor:
    options = {"video": VideoPlan.of_template(template), **options}
    return Processor(Bytes(), get_template(template), FramePixels(size), 128002, **options)


def spread(runs: list[list[int]]) -> list[int]:
    return [value for value, count in runs for _ in range(count)]


def greys(frames: Sequence[np.ndarray[Any, Any]]) -> list[int]:
    """The value of frames of one value each."""
    assert all(frame.min() == frame.max() for frame in frames)
    return [int(frame.min()) for frame in frames]


# --- rows ---


def conversation(recorded: dict[str, Any]) -> list[Message]:
    args = recorded["args"]
    messages: list[Message] = []
    for question, answer in args["history"]:
        messages += [user(question), assistant(answer)]
    messages.append(user(args["query"]))
    if args["image"]:
        count = recorded["images_shapes"][0][0]
        messages[0] = user(*messages[0].parts, Video(flat(range(count))))
    return [*messages, assistant(args["answer"])] if "answer" in args else messages


@pytest.mark.parametrize("case", sorted(LAYOUTS))
def test_rows_equal_the_recorded_layouts(case: str) -> None:
    recorded = LAYOUTS[case]
    ids, types = spread(recorded["input_ids"]), spread(recorded["token_type_ids"])
    size = 84 if case.endswith("size_84") else 224
    if size == 84:
        # Released rows have 66 places a frame whatever its size; here they have what it needs.
        ids, types = ids[: 1 + 11] + ids[1 + 66 :], types[: 1 + 11] + types[1 + 66 :]
    ours = processor(recorded["args"]["template_version"], size)
    row = ours.encode(conversation(recorded), train="answer" in recorded["args"])
    assert row.input_ids.tolist() == ids
    assert row.token_type_ids.tolist() == types
    shape = recorded.get("images_shapes", [[0]])[0]
    assert [list(p.shape) for p in row.pixel_values] == [shape[1:]] * shape[0]
    if row.labels is not None:
        assert row.labels.tolist() == spread(recorded["labels"])
    assert (row.labels is None) == ("labels" not in recorded)


def test_a_picture_is_a_film_of_one_frame() -> None:
    picture = PILImage.fromarray(flat([7])[0])
    for template in ("chat", "base"):
        ours = processor(template, 56)
        film_row = ours.encode([user(Video([picture]), "x")])
        row = ours.encode([user(picture, "x")])
        assert row.input_ids.tolist() == film_row.input_ids.tolist()
        assert (row.pixel_values[0] == film_row.pixel_values[0]).all()
        assert (1048 in row.input_ids) == (template == "chat")  # "0"


def test_films_of_a_conversation_are_counted_each_from_zero() -> None:
    first, second = Video(flat([1, 2])), Video(flat([3]))
    ours = processor("chat", 56)
    row = ours.encode([user("x", first), assistant("y"), user(second, "z")])
    block = [128002] * 6
    asked = Bytes().encode("Question: x Answer: y\n")
    expected = [1, *block, 1048, *block, 1049, *asked, *block, 1048]
    assert row.input_ids.tolist() == expected + Bytes().encode("Question: z Answer:")
    assert len(row.pixel_values) == 3


def test_films_of_a_batch() -> None:
    ours = processor("chat", 56)
    rows = [ours.encode([user(Video(flat(range(n))), "x")]) for n in (1, 3)]
    rows.append(ours.encode([system("Be brief."), user("no film")]))
    batch = ours.batch(rows)
    assert batch.image_counts == (1, 3, 0)
    assert [int(t) for t in batch.token_type_ids.sum(1)] == [6, 18, 0]
    assert len(batch.pixel_values) == 4
    assert (batch.pixel_values[1] == rows[1].pixel_values[0]).all()


def test_an_image_model_takes_no_film() -> None:
    ours = Processor(Bytes(), get_template("chat"), SquarePixels(56), 9)
    with pytest.raises(MessageError, match=r"takes pictures only; .*\(CogVLM2-Video"):
        ours.encode([user(Video("never opened.mp4"), "x")])
    with pytest.raises(ConfigError, match="pixels are SquarePixels; give FramePixels"):
        Processor(Bytes(), get_template("chat"), SquarePixels(56), 9, video=SECONDS)


# --- messages ---


def test_videos_as_values() -> None:
    frames = [PILImage.new("RGB", (2, 2), (i, 0, 0)) for i in range(3)]
    array = np.stack([np.asarray(frame) for frame in frames])
    assert Video(frames).source == tuple(frames) == Video(array).source
    assert repr(Video(frames)) == "Video(<3 frames>)"
    assert repr(Video(b"abc")) == "Video(<3 bytes>)"
    assert repr(Video("a.mp4")) == "Video('a.mp4')"
    message = user(Path("a.MP4"), "x", Path("b.png"))
    assert message.visuals == (Video(Path("a.MP4")), Image(Path("b.png")))
    assert message.images == (Image(Path("b.png")),) and message.text == "x"
    with pytest.raises(MessageError, match="assistant message has a video; only users"):
        Message("assistant", (Video("a.mp4"),))


@pytest.mark.parametrize(
    ("source", "say"),
    [
        (3, "video is a int; give a path"),
        (["a.png"], "video is a list; give a path"),
        ([], "video has no frame"),
        (np.zeros((0, 4, 4, 3), np.uint8), "video has no frame"),
        (np.zeros((4, 4, 3), np.uint8), r"video frames are uint8\[4, 4, 3\]; give uint8\[T, H"),
        (np.zeros((2, 4, 4, 3)), "video frames are float64"),
    ],
)
def test_what_is_no_video(source: Any, say: str) -> None:
    with pytest.raises(MessageError, match=say):
        Video(source)


def test_videos_in_requests() -> None:
    part = {"type": "video", "video": "a.mp4"}
    items = [{"role": "user", "content": [part, {"type": "text", "text": "x"}]}]
    assert parse_messages(items) == [user(Video("a.mp4"), "x")]
    with pytest.raises(MessageError, match="message 1: part type 'video' names a local file"):
        parse_messages(items, files=False)
    with pytest.raises(MessageError, match="video part has no 'video'"):
        parse_messages([{"role": "user", "content": [{"type": "video"}]}])


# --- choosing frames ---


def released_seconds(times: list[float]) -> list[int]:
    """The rule in words: for each second, the first of the frames with the smallest distance."""
    seconds = range(min(24, round(max(times)) + 1))
    return [min(range(len(times)), key=lambda i: (abs(times[i] - s), i)) for s in seconds]


def test_frames_nearest_to_seconds() -> None:
    rng = np.random.default_rng(0)
    cases = [[0.0], [0.0, 0.5], [0.0, 0.6], [0.0, 1.5], [0.0, 5.2], [i / 25 for i in range(1000)]]
    cases += [[0.0, *np.cumsum(rng.choice([0.25, 0.5, 1.25], 40)).tolist()] for _ in range(50)]
    for times in cases:
        assert nearest_to_seconds(times, 24) == released_seconds(times)
    assert nearest_to_seconds([i / 30 for i in range(9000)], 24) == [30 * s for s in range(24)]
    assert nearest_to_seconds([], 24) == []


def test_frames_evenly_over_a_minute() -> None:
    assert evenly(24, 25.0, UNIFORM) == list(range(24))
    assert evenly(3, 25.0, UNIFORM) == [0] * 12 + [1] * 11 + [2]
    assert evenly(1, 25.0, UNIFORM) == [0] * 24
    # 100 s of 30 frames: only the first 60 s count.
    assert evenly(3000, 30.0, UNIFORM) == np.linspace(0, 1799, 24).astype(int).tolist()
    assert evenly(3000, None, UNIFORM)[-1] == 2999
    assert evenly(5, 0.001, UNIFORM) == [0] * 24


@pytest.mark.parametrize("values", [{"choice": "all"}, {"frames": 0}, {"seconds": 1.5}])
def test_impossible_plans(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        VideoPlan(**values)


# --- reading files ---


def test_frames_of_a_file() -> None:
    data = film(flat(range(0, 200, 10)))  # 20 frames, 5 a second
    assert greys(load_video(data, SECONDS)) == [0, 50, 100, 150, 190]
    assert greys(load_video(data, VideoPlan("seconds", frames=2))) == [0, 50]
    assert greys(load_video(data, VideoPlan("uniform", frames=4))) == [0, 60, 120, 190]
    assert greys(load_video(data, VideoPlan("uniform", frames=2, seconds=2))) == [0, 90]
    few = load_video(film(flat([5, 9])), UNIFORM)
    assert greys(few) == [5] * 23 + [9]


def test_frames_at_uneven_times() -> None:
    data = film(flat([0, 10, 20, 30, 40]), times=[0.0, 0.9, 1.2, 4.4, 4.6])
    assert greys(load_video(data, SECONDS)) == [0, 10, 20, 30, 30, 40]
    late = film(flat([0, 10, 20]), times=[10.0, 11.0, 12.0])  # a film may begin at any time
    assert greys(load_video(late, SECONDS)) == [0, 10, 20]


def test_every_kind_of_source(tmp_path: Path) -> None:
    data = film(flat([1, 2, 3]), rate=1)
    path = tmp_path / "a film.mkv"
    path.write_bytes(data)
    stream = io.BytesIO(data)
    stream.read()  # it is read from its start
    for source in (data, path, str(path), stream, Video(flat([1, 2, 3])).source):
        assert greys(load_video(source, SECONDS)) == [1, 2, 3]
    with path.open("rb") as file:
        assert greys(load_video(file, UNIFORM)) == [1] * 12 + [2] * 11 + [3]


def test_mp4_and_films_on_their_side() -> None:
    values = np.zeros((3, 24, 32, 3), np.uint8)
    values[:, :12] = 200  # the upper half is light
    straight = mp4(values)
    (upright,) = load_video(straight, SECONDS)
    assert upright.shape == (24, 32, 3)
    assert np.abs(upright.astype(int) - values[0]).max() < 30
    (lying,) = load_video(turned(straight), SECONDS)
    assert lying.shape == (32, 24, 3)
    assert (lying == np.rot90(upright, -1)).all()  # a quarter clockwise


def test_frames_given_as_pictures_are_limited() -> None:
    frames = Video(flat(range(5))).source
    with pytest.raises(ImageError, match="given as 5 frames, this model takes at most 4"):
        load_video(frames, VideoPlan("seconds", frames=4))
    see_through = Video([PILImage.new("RGBA", (3, 2), (0, 0, 0, 0))])
    assert greys(load_video(see_through.source, SECONDS)) == [255]
    with pytest.raises(ImageError, match="over the limit of 10"):
        load_video(frames, SECONDS, VideoLimits(max_pixels=10))


GOOD = film(flat(range(20)))
BROKEN = {
    "nothing": (b"", "video data is empty"),
    "text": (b"no film at all" * 99, "broken, cut off or no video"),
    "sound": (sound(), "has no film in it, only sound"),
    "cut off": (mp4(flat(range(9)))[:600], "has no film in it .perhaps it is cut off"),
    "playlist": (b"#EXTM3U\n#EXTINF:9,\nx.ts\n#EXT-X-ENDLIST\n", "broken, cut off or no video"),
    "list": (b"ffconcat version 1.0\nfile x.mp4\n", "broken, cut off or no video"),
}


@pytest.mark.parametrize("plan", [SECONDS, UNIFORM], ids=["seconds", "uniform"])
@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_cannot_be_read_give_one_line(kind: str, plan: VideoPlan) -> None:
    data, say = BROKEN[kind]
    with pytest.raises(ImageError, match=say) as caught:
        load_video(data, plan)
    assert "\n" not in str(caught.value)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none.mp4' does not exist"):
        load_video(tmp_path / "none.mp4", SECONDS)
    with pytest.raises(ImageError, match="is no regular file"):
        load_video(tmp_path, SECONDS)
    with pytest.raises(ImageError, match="video data is a int; give bytes"):
        load_video(3, SECONDS)  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [SECONDS, UNIFORM], ids=["seconds", "uniform"])
@pytest.mark.parametrize(
    ("limits", "say"),
    [
        ({"max_bytes": 100}, "over 100 bytes, the limit"),
        ({"max_seconds": 3.0}, "is 4 s long, over the limit of 3 s"),
        ({"max_pixels": 700}, "32x24 pixels a frame, over the limit of 700"),
        ({"max_decoded": 6}, "6 frames decoded, the limit"),
    ],
)
def test_limits(limits: dict[str, Any], say: str, plan: VideoPlan) -> None:
    for source in (GOOD, io.BytesIO(GOOD)):
        with pytest.raises(ImageError, match=say):
            load_video(source, plan, VideoLimits(**limits))


def test_without_pyav_the_extra_is_named() -> None:
    code = (
        f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; sys.modules['av'] = None\n"
        "from cogvlm.errors import ImageError\n"
        "from cogvlm.processor import VideoPlan, load_video\n"
        "try: load_video(b'x', VideoPlan())\n"
        "except ImageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "video data: reading videos needs PyAV; install it with: pip install 'cogvlm[video]'\n"
    )


# --- pixels ---


@pytest.mark.parametrize("name", ["video1", "video3"])
def test_pixels_equal_the_recorded_ones(name: str) -> None:
    frames = PIXELS[f"{name}.uint8"].transpose(1, 2, 3, 0)
    small = np.stack([FramePixels(56).frame(frame) for frame in frames])
    assert small.dtype == np.float32
    np.testing.assert_allclose(small, PIXELS[f"{name}.size56"], rtol=0, atol=1e-4)
    whole = np.stack([FramePixels(224).frame(frame) for frame in frames])
    crop = PIXELS[f"{name}.size224.crop"]
    np.testing.assert_allclose(whole[:, :, 96:128, 96:128], crop, rtol=0, atol=1e-4)
    corners = [
        whole[:, :, a, b] for a in (slice(4), slice(-4, None)) for b in (slice(4), slice(-4, None))
    ]
    np.testing.assert_allclose(
        np.stack(corners), PIXELS[f"{name}.size224.corners"], rtol=0, atol=1e-4
    )
    mean, std = whole.mean((0, 2, 3)), whole.std((0, 2, 3), ddof=1)
    np.testing.assert_allclose(mean, PIXELS[f"{name}.size224.mean"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(std, PIXELS[f"{name}.size224.std"], rtol=0, atol=1e-5)


def test_pixels_of_any_shape() -> None:
    for width, height in ((1, 1), (1, 500), (500, 1), (56, 56), (57, 56), (3, 1000)):
        pixels = FramePixels(56)(PILImage.new("RGB", (width, height), (255, 0, 0)))
        assert pixels.shape == (3, 56, 56)
        # One colour stays one colour, wherever the crop is.
        assert np.ptp(pixels, axis=(1, 2)).max() < 1e-5
    assert FramePixels() == FramePixels(224, 14, 2)
    assert FramePixels().tokens(*FramePixels().grid(1920, 1080)) == 66
    with pytest.raises(ImageError, match="needs an RGB image, got L"):
        FramePixels(56)(PILImage.new("L", (4, 4)))
    with pytest.raises(ConfigError, match="size 50 is no multiple"):
        FramePixels(50)
