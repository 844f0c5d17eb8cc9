"""Llama-type sentencepiece files against that library, and whose tokenizer is taken."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from cogvlm.errors import CheckpointError
from cogvlm.processor import Detokenizer, FastTokenizer, Processor, open_tokenizer, user
from cogvlm.processor.tokenizer import VICUNA
from processor.standin import toy_tokenizer

LLAMA = {
    "model_type": "bpe",
    "vocab_size": 360,
    "hard_vocab_limit": False,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "character_coverage": 1.0,
    "minloglevel": 9,
}
TEXT = ["Question: what does the red bus say? Answer: 12 的 红 bus", "the  two   spaces"] * 20


def train(**changes: Any) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=out, **{**LLAMA, **changes}
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def toy() -> bytes:
    return train()


def vicuna(folder: Path, toy: bytes) -> Path:
    """The files of Vicuna's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(toy)
    names = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_ids_equal_those_of_sentencepiece(toy: bytes, tmp_path: Path) -> None:
    ours = FastTokenizer.from_folder(vicuna(tmp_path, toy))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=toy)
    rng = np.random.default_rng(0)
    words = [*TEXT[0].split(), *TEXT[1].split(" "), "\n", "😀", "é", "▁", "\t", "<b>", "?!"]
    texts = ["", " ", "  lead", "tail ", "Question: Hi? Answer:", "a\n\nb"]
    texts += ["".join(rng.choice([*words, " "], 12)) for _ in range(300)]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids), text
        stream = Detokenizer(ours)
        assert "".join(map(stream.add, ids)) + stream.finish() == ours.decode(ids)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, None)
    assert ours.decode([1, *ours.encode("red bus"), 2]) == "red bus"


def test_control_tokens_of_a_user_are_text(toy: bytes, tmp_path: Path) -> None:
    ours = FastTokenizer.from_folder(vicuna(tmp_path, toy))
    assert not {0, 1, 2} & set(ours.encode("</s><s> <unk>"))


def test_ids_of_the_special_tokens(toy: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(toy)
    alone = open_tokenizer(path)  # bos and eos are named in the file itself
    assert (alone.bos_id, alone.eos_id, alone.pad_id) == (1, 2, None)
    assert open_tokenizer(str(path), {"pad_token_id": 0}).pad_id == 0
    (tmp_path / "config.json").write_text('{"pad_token_id": 7}')
    assert open_tokenizer(tmp_path).pad_id == 7
    # tokenizer.json is preferred where both are.
    toy_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert FastTokenizer.from_folder(tmp_path).token_id("<image>") is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_kinds_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(**changes))
    with pytest.raises(CheckpointError, match=r"another kind than Llama's; convert it to tokenize"):
        FastTokenizer.from_folder(tmp_path)


def test_damaged_files_give_one_line(toy: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for data in (b"", b"version https://git-lfs", toy[:-100], toy[:5000], b"\x08\x01", b"\x0a\x01"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="sentencepiece model") as caught:
            open_tokenizer(path)
        assert "\n" not in str(caught.value)


# --- whose tokenizer is taken ---

CONFIG: dict[str, Any] = {
    "vision_config": {"image_size": 56, "patch_size": 14},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def released(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the model hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def in_cache(cache: Path, toy: bytes) -> None:
    box = cache / "models--lmsys--vicuna-7b-v1.5"
    vicuna(box / "snapshots" / "abc", toy)
    (box / "refs").mkdir()
    (box / "refs" / "main").write_text("abc")


def test_a_first_generation_folder_takes_its_own_tokenizer(
    toy: bytes, tmp_path: Path, hub_cache: Path
) -> None:
    folder = vicuna(released(tmp_path / "model"), toy)
    toy_tokenizer().save(str(folder / "tokenizer.json"))
    ours = Processor.from_folder(folder)
    assert ours.tokenizer.token_id("<image>") is not None


def test_else_the_one_in_the_hub_cache(toy: bytes, tmp_path: Path, hub_cache: Path) -> None:
    in_cache(hub_cache, toy)
    ours = Processor.from_folder(released(tmp_path / "model"))
    ids = (ours.tokenizer.bos_id, ours.tokenizer.eos_id, ours.tokenizer.pad_id)
    assert (ids, ours.image_token_id) == ((1, 2, 0), 0)
    assert open_tokenizer(VICUNA).eos_id == 2
    row = ours.encode([user("Hi?")])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=toy)
    assert row.input_ids.tolist() == [1, *theirs.encode("Question: Hi? Answer:")]


def test_else_what_to_fetch_is_said(tmp_path: Path, hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hf download lmsys/vicuna-7b-v1.5 tokenizer.model"):
        Processor.from_folder(released(tmp_path / "model"))
    # The second generation has its tokenizer in its folder.
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        Processor.from_folder(released(tmp_path / "model", num_multi_query_heads=2))
    for name in ("no such/folder", "owner/name", VICUNA):
        with pytest.raises(CheckpointError, match=r"no such file or folder; give the tokenizer"):
            open_tokenizer(name)
