"""Tokenizers that are stored as a list of byte strings with ranks, one a line (GLM-4).

::

    IQ== 0          base64 of the bytes, then the rank, which is the token's id
    Ig== 1

Such a file has no merges and no special tokens.  The merges follow from the ranks; the special
tokens stand in ``tokenizer_config.json``, and are those of GLM-4 where it names none.  No code of
the folder is run.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ..errors import CheckpointError

GLM4_SPECIALS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
"""Special tokens of GLM-4, whose ids follow the ranks: 151329 is the first."""

# Where text is cut before merging; that of GLM-4, and of other tokenizers of this kind.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_rank_file(path: Path) -> bool:
    """Whether a ``tokenizer.model`` is of this kind; SentencePiece files have the same name."""
    try:
        with path.open("rb") as file:
            first = file.readline(4096).split()
    except OSError:
        return False
    return len(first) == 2 and first[1].isdigit() and _bytes_of(first[0]) is not None


def read_tiktoken(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer of a rank file.

    Args:
        path: the file.
        config: ``tokenizer_config.json``; its ``added_tokens_decoder`` gives the special tokens.

    Raises:
        CheckpointError: the file is missing or damaged, or the special tokens do not follow it.
    """
    ranks = read_ranks(path)
    specials = _specials(config, len(ranks), path)
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    model = models.BPE(
        vocab={spell(token): rank for token, rank in ranks.items()},
        merges=[(spell(a), spell(b)) for a, b in merges_of(ranks)],
        ignore_merges=True,  # a word that is a token is that token, whatever merges give
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in specials]
    )
    for i, name in enumerate(specials, len(ranks)):
        if tokenizer.token_to_id(name) != i:
            raise CheckpointError(
                f"{path}: the special token {name!r} is {tokenizer.token_to_id(name)}, not {i}: "
                "it is among the tokens with a rank; download the file again"
            )
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Byte strings and ranks, in the order of the ranks, which are 0, 1, 2...

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read ({exc}); download it again") from None
    found: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        token = _bytes_of(fields[0])
        if len(fields) != 2 or token is None or not fields[1].isdigit():
            raise CheckpointError(
                f"{path}, line {number}: not a token in base64 and its rank; download it again"
            )
        found[token] = int(fields[1])
    ranks = dict(sorted(found.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: the ranks are not 0, 1, 2...; download it again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of the 256 single bytes are no token, the first is "
            f"{missing[0]}; download it again"
        )
    return ranks


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that together are a token, in the order of that token's rank.

    A rank file joins the neighbours whose *joined* bytes have the lowest rank.  What is joined
    inside a token depends on its own bytes only, so of several pairs for one token only one is
    ever met, and their order does not matter.
    """
    return [
        (token[:i], token[i:])
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]


def byte_letters() -> Sequence[str]:
    """The printable letter that byte-level BPE writes for each byte.

    Printable bytes of Latin-1 stand for themselves; the others follow from U+0100 on.
    """
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, moved = [], 0
    for byte in range(256):
        letters.append(chr(byte if byte in kept else 0x100 + moved))
        moved += byte not in kept
    return letters


def _bytes_of(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True) or None
    except binascii.Error:
        return None


def _specials(config: Mapping[str, Any], first: int, path: Path) -> Sequence[str]:
    """Names of the special tokens whose ids are ``first``, ``first + 1``..."""
    added = config.get("added_tokens_decoder")
    if added is None:
        return GLM4_SPECIALS
    try:
        names = {int(key): str(entry["content"]) for key, entry in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path.parent / 'tokenizer_config.json'}: added_tokens_decoder is damaged; "
            "download it again"
        ) from None
    ids = sorted(names)
    if ids != list(range(first, first + len(ids))):
        raise CheckpointError(
            f"{path} has {first} tokens, but the special tokens of tokenizer_config.json have the "
            f"ids {ids[0]} to {ids[-1]}; the two files do not belong together"
        )
    return [names[i] for i in ids]
