"""Lists of tokens and ranks: the same ids as merging by rank gives, and damage is noticed."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex

from cogvlm.errors import CheckpointError
from cogvlm.processor import Detokenizer, FastTokenizer
from cogvlm.processor.tiktoken import (
    GLM4_SPECIALS,
    byte_letters,
    is_rank_file,
    merges_of,
    read_ranks,
)

WORDS = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Ranks that decide: "bc" before "ab"; "cabc" from "c" + "abc" or "ca" + "bc"; "zq" has no way
# through pairs; a Chinese character from its three bytes.
PIECES = ["bc", "ca", "ab", "abc", "cabc", " a", " ab", "aa", "aaa", "12", "  ", "\n\n", "'s"]
TOKENS = [p.encode() for p in PIECES] + [b"zqx", b"\xe4\xb8", "中".encode(), "\xe9".encode()]


def write(folder: Path, tokens: list[bytes] | None = None, **config: Any) -> Path:
    """A folder with a rank file of all bytes and ``tokens``."""
    rows = [bytes([i]) for i in range(256)] + (TOKENS if tokens is None else tokens)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(rows)]
    (folder / "tokenizer.model").write_text("".join(lines))
    (folder / "config.json").write_text(json.dumps({"pad_token_id": 3, "vision_config": {}}))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def by_rank(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Plain merging by rank: the lowest joined rank first, the leftmost of equal ones."""
    ids: list[int] = []
    for word in WORDS.findall(text):
        whole = word.encode()
        parts = [whole] if whole in ranks else [bytes([b]) for b in whole]
        while True:
            joined = [ranks.get(a + b, 1 << 30) for a, b in pairwise(parts)]
            if not joined or min(joined) == 1 << 30:
                break
            at = joined.index(min(joined))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_ids_are_those_of_merging_by_rank(tmp_path: Path) -> None:
    tokenizer = FastTokenizer.from_folder(write(tmp_path))
    ranks = read_ranks(tmp_path / "tokenizer.model")
    rng = random.Random(0)
    used: set[int] = set()
    texts = [
        "".join(rng.choices("aaabbbccc zqx12 \n'sé中", k=rng.randrange(30))) for _ in range(300)
    ]
    for text in ["cabc", "bcabcab", *texts]:
        ids = tokenizer.encode(text)
        assert ids == by_rank(text, ranks)
        assert tokenizer.decode(ids) == text
        used.update(ids)
    unseen = {ranks[b"zqx"], ranks[b"\xe4\xb8"]}  # the second always goes on to a character
    assert used >= set(range(256, 256 + len(TOKENS))) - unseen
    assert tokenizer.encode("zqx") == [ranks[b"zqx"]]  # a whole word, though no merge makes it
    assert tokenizer.encode("azqx") == [ranks[bytes([b])] for b in b"azqx"]


def test_merges_are_all_pairs_in_the_order_of_what_they_make() -> None:
    ranks = {bytes([i]): i for i in range(256)}
    for token in TOKENS:
        ranks[token] = len(ranks)
    merges = merges_of(ranks)
    made = [ranks[a + b] for a, b in merges]
    assert made == sorted(made)
    assert set(made) == {ranks[t] for t in TOKENS if t != b"zqx"}
    pairs = [pair for pair in merges if b"".join(pair) == b"cabc"]
    assert pairs == [(b"c", b"abc"), (b"ca", b"bc")]


def test_every_byte_has_its_own_printable_letter() -> None:
    letters = byte_letters()
    assert len(set(letters)) == 256
    assert all(letter.isprintable() and not letter.isspace() for letter in letters)
    assert (letters[ord("a")], letters[ord(" ")], letters[ord("\n")]) == ("a", "Ġ", "Ċ")


def test_special_tokens_follow_the_ranks(tmp_path: Path) -> None:
    tokenizer = FastTokenizer.from_folder(write(tmp_path))
    first = 256 + len(TOKENS)
    assert [tokenizer.token_id(name) for name in GLM4_SPECIALS] == [*range(first, first + 14)]
    # Of the released 151329 ranks: <|user|>, <|begin_of_image|> and <|end_of_video|>.
    ids = {name: 151329 + i for i, name in enumerate(GLM4_SPECIALS)}
    assert (ids["<|user|>"], ids["<|begin_of_image|>"]) == (151336, 151339)
    assert ids["<|end_of_video|>"] == 151342
    assert max(tokenizer.encode("<|user|> [gMASK]")) < first  # never read out of text
    assert tokenizer.decode([first, 256, first + 7]) == "bc"
    assert (tokenizer.eos_id, tokenizer.pad_id) == (None, 3)


def test_names_of_special_tokens_come_from_the_folder(tmp_path: Path) -> None:
    first = 256 + len(TOKENS)
    added = {str(first + i): {"content": name} for i, name in enumerate(("<end>", "<new>"))}
    write(tmp_path, added_tokens_decoder=added, eos_token="<end>", pad_token="<end>")
    tokenizer = FastTokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (first, first)
    assert tokenizer.token_id("<new>") == first + 1
    assert tokenizer.token_id("<sop>") is None
    write(tmp_path, TOKENS[:-1])
    with pytest.raises(CheckpointError, match=f"has {first - 1} tokens, but the special tokens"):
        FastTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": 1}}')
    with pytest.raises(CheckpointError, match="added_tokens_decoder is damaged"):
        FastTokenizer.from_folder(tmp_path)


def test_a_special_token_among_the_ranks_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [b"<sop>"])
    with pytest.raises(CheckpointError, match="'<sop>' is 256, not 261: it is among the tokens"):
        FastTokenizer.from_folder(tmp_path)


def test_a_character_of_several_tokens_is_held_back_until_it_is_whole(tmp_path: Path) -> None:
    tokenizer = FastTokenizer.from_folder(write(tmp_path))
    stream = Detokenizer(tokenizer)
    assert [stream.add(i) for i in (*"中文".encode(),)] == ["", "", "中", "", "", "文"]


def test_tokenizer_json_goes_first(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        FastTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "say"),
    [
        ("???? 273", "line 274: not a token in base64"),
        ("YQ== x", "line 274: not a token in base64"),
        ("YQ==", "line 274: not a token in base64"),
        ("YWJjZA== 900", "ranks are not 0, 1, 2"),
        ("YQ== 273", "ranks are not 0, 1, 2"),  # the letter a, twice
    ],
)
def test_a_damaged_file_is_named(line: str, say: str, tmp_path: Path) -> None:
    path = write(tmp_path) / "tokenizer.model"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(CheckpointError, match=say):
        read_ranks(path)


def test_a_file_without_every_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text("YQ== 0\nYg== 1\n")
    with pytest.raises(CheckpointError, match="254 of the 256 single bytes are no token"):
        read_ranks(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_ranks(tmp_path / "none.model")


def test_which_files_are_rank_files(tmp_path: Path) -> None:
    assert is_rank_file(write(tmp_path) / "tokenizer.model")
    other = tmp_path / "other.model"
    for content in (b"", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", b"{\n}", b"a b c\n"):
        other.write_bytes(content)
        assert not is_rank_file(other)
    assert not is_rank_file(tmp_path)
