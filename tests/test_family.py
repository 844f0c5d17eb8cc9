"""Models of the family in the released layout, from a folder to an answer on the command line.

The folders are toys: the released config.json with small numbers, weights in two files with an
index, and a tokenizer of the model's kind.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner, Result

from cogvlm.cli import app
from cogvlm.config import CogVLMConfig, recognise
from cogvlm.engine import GenerationSettings, complete
from cogvlm.load import load, skeleton
from cogvlm.processor import FramePixels, SquarePixels, Video, user
from films import flat, mp4

# --- the released configurations ---

_VISION = {
    "dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1792,
    "in_channels": 3,
    "intermediate_size": 15360,
    "layer_norm_eps": 1e-06,
    "num_heads": 16,
    "num_hidden_layers": 63,
    "patch_size": 14,
}
_COMMON = {
    "auto_map": {"AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM"},
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "template_version": "chat",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_LLAMA3 = {
    **_COMMON,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128002,
    "intermediate_size": 14336,
    "num_multi_query_heads": 8,
    "vocab_size": 128256,
}
RELEASED: dict[str, dict[str, Any]] = {
    "cogvlm": {
        **_COMMON,
        "architectures": ["CogVLMForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
        "transformers_version": "4.36.0.dev0",
        "vision_config": {**_VISION, "image_size": 490, "num_positions": 1226},
    },
    "cogvlm2": {
        **_LLAMA3,
        "architectures": ["CogVLMForCausalLM"],
        "max_position_embeddings": 8192,
        "transformers_version": "4.41.0",
        "vision_config": {**_VISION, "image_size": 1344, "num_positions": 9217},
    },
    "cogvlm2_video": {
        **_LLAMA3,
        "architectures": ["CogVLMVideoForCausalLM"],
        "max_position_embeddings": 2048,
        "transformers_version": "4.43.1",
        "vision_config": {**_VISION, "image_size": 224, "num_positions": 257},
    },
}

# Number of tensors of the full-size checkpoint, and SHA-256 over its sorted lines "name 1x2x3".
DIGESTS = {
    "cogvlm": (1187, "96a241148831f4732ae6c44449fd9b8871918bdeea1c65f72ed0f6090f00093d"),
    "cogvlm2": (1221, "004108fd78c6a9241aae1ad41faad8bf3229bb949a0642078ad6baf09c05efda"),
    "cogvlm2_video": (1029, "8211aa3d1100cd47d8824c67f7e4baaa7aabdb476870ac65f69741805d23e815"),
}


@pytest.mark.parametrize("family", RELEASED)
def test_full_size_models_have_the_released_tensors(family: str) -> None:
    tensors = skeleton(recognise(RELEASED[family], "config.json")).state_dict()
    lines = sorted(f"{name} {'x'.join(map(str, t.shape))}" for name, t in tensors.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), digest) == DIGESTS[family]


# --- toys in the released layout ---

_TEXT = ["Question: what does the red bus say? Answer: it says 12", "Short answer: the bus"] * 20


def llama3_tokenizer(folder: Path) -> None:
    """``tokenizer.json`` of bytes and merges; bos, eos and the image place are its last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    assert tokenizer.token_to_id(names[0]) == 280
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"bos_token": names[0], "eos_token": names[1], "tokenizer_class": "PreTrained"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def vicuna_tokenizer(folder: Path) -> Path:
    """``tokenizer.model`` as Vicuna has it."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT),
        model_writer=out,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=9,
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    names = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def toy_values(family: str) -> dict[str, Any]:
    values = {
        **RELEASED[family],
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 320,
    }
    if family != "cogvlm":
        values |= {"num_multi_query_heads": 2}
        values |= {"bos_token_id": 280, "eos_token_id": 281, "pad_token_id": 282}
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_heads": 4, "intermediate_size": 80}
    small |= {"image_size": 56, "num_positions": 17}
    return {**values, "vision_config": {**values["vision_config"], **small}}


def toy_folder(folder: Path, family: str) -> Path:
    """config.json, two weight files and their index; the tokenizer where it is released."""
    folder.mkdir()
    values = toy_values(family)
    (folder / "config.json").write_text(json.dumps(values))
    config = recognise(values, "config.json")
    assert isinstance(config, CogVLMConfig)
    config.initializer_range = 0.3  # what the toy says depends on what it sees
    torch.manual_seed(0)
    model = type(skeleton(config))(config)
    tensors = {n: t.to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
    names, where = sorted(tensors), {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({n: tensors[n] for n in chosen}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(chosen, file)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if family != "cogvlm":
        llama3_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("toys")
    made = {family: toy_folder(home / family, family) for family in RELEASED}
    made["vicuna"] = vicuna_tokenizer(home / "vicuna")
    return made


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two pictures, and two films of 2.4 and 1.4 seconds."""
    home = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    paths = {name: home / name for name in ("a.png", "b.png", "clip.mp4", "short.mp4")}
    for name in ("a.png", "b.png"):
        PILImage.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(paths[name])
    paths["clip.mp4"].write_bytes(mp4(flat(range(0, 240, 20), 64, 48)))
    paths["short.mp4"].write_bytes(mp4(flat(range(240, 100, -20), 64, 48)))
    return paths


def cogvlm_(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


ASKED = ("--max-new-tokens", 6, "--device", "cpu", "--no-repetition-stop")
SETTINGS = GenerationSettings(6, repetition_stop=False)


@pytest.mark.parametrize("family", RELEASED)
def test_a_released_folder_is_loaded_and_asked(
    family: str, toys: dict[str, Path], media: dict[str, Path]
) -> None:
    folder = toys[family]
    words = toys["vicuna"] if family == "cogvlm" else None
    loaded = load(folder, device="cpu", tokenizer=words)
    kind = FramePixels if family == "cogvlm2_video" else SquarePixels
    assert loaded.processor.pixels == kind(56, 14, 1 if family == "cogvlm" else 2)
    stored = skeleton(loaded.model.config).state_dict().keys()
    assert stored == loaded.model.state_dict().keys()

    answers = {}
    for name in ("a.png", "b.png"):
        answers[name] = complete(loaded, [user(media[name], "what bus?")], SETTINGS)
        named = ("--tokenizer", words) if words else ()
        told = cogvlm_("ask", "--model", folder, media[name], "what bus?", "--json", *named, *ASKED)
        assert (told.exit_code, told.stderr) == (0, "")
        values = json.loads(told.stdout)
        assert values["answer"] == answers[name].text
        assert values["tokens"] == len(answers[name].ids) > 0
    assert answers["a.png"].ids != answers["b.png"].ids


def test_a_first_generation_folder_without_a_tokenizer(
    toys: dict[str, Path], media: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    told = cogvlm_("ask", "--model", toys["cogvlm"], media["a.png"], "what?", *ASKED)
    assert (told.exit_code, told.stdout) == (1, "")
    assert "hf download lmsys/vicuna-7b-v1.5" in told.stderr and "--tokenizer" in told.stderr
    file = toys["vicuna"] / "tokenizer.model"
    told = cogvlm_("ask", "-m", toys["cogvlm"], "--tokenizer", file, media["a.png"], "w?", *ASKED)
    assert told.exit_code == 0 and told.stdout


# --- films ---


def test_a_film_is_asked_about(toys: dict[str, Path], media: dict[str, Path]) -> None:
    folder = toys["cogvlm2_video"]
    loaded = load(folder, device="cpu")
    question = user(Video(media["clip.mp4"]), "what bus?")
    row = loaded.processor.encode([question])
    assert row.token_type_ids.sum() == 3 * 6 and len(row.pixel_values) == 3  # 0, 1 and 2 s
    answer = complete(loaded, [question], SETTINGS)
    told = cogvlm_("ask", media["clip.mp4"], "what bus?", "--model", folder, *ASKED)
    assert (told.exit_code, told.stdout, told.stderr) == (0, f"{answer.text}\n", "")
    other = complete(loaded, [user(media["short.mp4"], "what bus?")], SETTINGS)
    assert other.ids != answer.ids


def test_two_films_in_a_batch_are_answered_as_alone(
    toys: dict[str, Path], media: dict[str, Path]
) -> None:
    loaded = load(toys["cogvlm2_video"], device="cpu")
    # Padding moves the positions by one, which the released bfloat16 tables round differently.
    loaded.model.config.rotary = "float32"
    clips = [user(media[n], "what bus?") for n in ("clip.mp4", "short.mp4")]
    clips += [user("no film"), user(media["a.png"], "what?")]
    rows = [loaded.processor.encode([clip]) for clip in clips]
    batch = loaded.processor.batch(rows)
    assert batch.image_counts == (3, 2, 0, 1)

    def logits(given: Any) -> torch.Tensor:
        images = [torch.from_numpy(p) for p in given.pixel_values]
        with torch.no_grad():
            out: torch.Tensor = loaded.model(
                torch.from_numpy(given.input_ids),
                torch.from_numpy(given.token_type_ids),
                torch.from_numpy(given.attention_mask),
                pixel_values=images or None,
            ).logits
        return out[:, -1]

    together = logits(batch)
    for i, row in enumerate(rows):
        alone = logits(loaded.processor.batch([row]))[0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-4)


def test_films_in_a_file_of_requests(
    toys: dict[str, Path], media: dict[str, Path], tmp_path: Path
) -> None:
    lines: list[dict[str, Any]] = [
        {"id": 1, "video": str(media["clip.mp4"]), "question": "what bus?"},
        {"id": 2, "video": str(media["short.mp4"]), "question": "what bus?"},
        {"id": 3, "image": str(media["a.png"]), "question": "what?"},
        {"id": 4, "video": "none.mp4", "question": "what?"},
        {"id": 5, "video": "a.mp4", "image": "a.png", "question": "what?"},
        {"id": 6, "video": ["a.mp4"], "question": "what?"},
    ]
    requests, output = tmp_path / "r.jsonl", tmp_path / "a.jsonl"
    requests.write_text("\n".join(map(json.dumps, lines)))
    told = cogvlm_("run", requests, "-o", output, "-m", toys["cogvlm2_video"], *ASKED)
    assert told.exit_code == 0, told.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    loaded = load(toys["cogvlm2_video"], device="cpu")
    for answer, name in zip(answers[:2], ("clip.mp4", "short.mp4"), strict=True):
        alone = complete(loaded, [user(media[name], "what bus?")], SETTINGS)
        assert answer["prediction"] == alone.text
    assert "prediction" in answers[2]
    says = ("none.mp4' does not exist", "both 'image' and 'video'", "give one path")
    for answer, say in zip(answers[3:], says, strict=True):
        assert say in answer["error"]


def test_an_image_model_refuses_a_film(toys: dict[str, Path], media: dict[str, Path]) -> None:
    told = cogvlm_("ask", media["clip.mp4"], "what?", "--model", toys["cogvlm2"], *ASKED)
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr.count("\n") == 1 and "CogVLM2-Video" in told.stderr


def test_base_video_models_take_frames_evenly(
    toys: dict[str, Path], media: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for file in toys["cogvlm2_video"].iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    values = {**toy_values("cogvlm2_video"), "template_version": "base"}
    (folder / "config.json").write_text(json.dumps(values))
    loaded = load(folder, device="cpu")
    row = loaded.processor.encode([user(media["clip.mp4"], "x")])
    assert len(row.pixel_values) == 24
    assert row.token_type_ids.tolist()[: 2 + 24 * 6] == [0] + [1] * (24 * 6) + [0]
    # The frames are one block: a shared position for everything between the outer markers.
    types = torch.from_numpy(row.token_type_ids)[None]
    positions = loaded.model.model.position_ids(types, None, None)[0]
    assert positions[: 2 + 24 * 6].tolist() == [0, 1, *[2] * (24 * 6 - 2), 3, 4]
