"""``tokenizer.model`` of Llama and Vicuna -> a ``tokenizers.Tokenizer``, without sentencepiece.

The file is a protocol buffer (``sentencepiece_model.proto``); of its fields these are read::

    1 pieces (repeated)      1 text   2 score   3 type: 1 normal, 2 unknown, 3 control, 6 byte
    2 trainer                3 kind of model: 2 is BPE    46 bos piece    47 eos piece
    3 normalizer             2 character map   3 dummy prefix   4 remove spaces   5 escape spaces
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from ..errors import CheckpointError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BPE = 2


def read_sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of a sentencepiece file, and the strings of its bos and eos token.

    Raises:
        CheckpointError: the file cannot be read, or is not of the kind that Llama has.
    """
    try:
        parts = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in parts if number == 1]
        trainer = dict(_fields(_last(parts, 2)))
        normalizer = dict(_fields(_last(parts, 3)))
        names = {
            "bos_token": trainer.get(46, b"<s>").decode(),
            "eos_token": trainer.get(47, b"</s>").decode(),
        }
    except (OSError, ValueError, TypeError, AttributeError, LookupError, struct.error) as exc:
        raise CheckpointError(
            f"{path} is damaged or no sentencepiece model ({exc}); download it again"
        ) from None
    if not pieces or len({text for text, _, _ in pieces}) < len(pieces):
        raise CheckpointError(
            f"{path} is no sentencepiece model: no pieces, or one twice; download it again"
        )
    # As Llama's: BPE, text as it is, a space put in front, and spaces kept.
    plain = not normalizer.get(2) and normalizer.get(3, 1) and normalizer.get(5, 1)
    if trainer.get(3, 1) != _BPE or not plain or normalizer.get(4, 1):
        raise CheckpointError(
            f"{path} is a sentencepiece model of another kind than Llama's; convert it to "
            "tokenizer.json (transformers does) and put that beside it"
        )
    return _build(pieces), names


def _build(pieces: list[tuple[str, float, int]]) -> tokenizers.Tokenizer:
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    unknown = [text for text, _, kind in pieces if kind == _UNKNOWN]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            _merges(pieces),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=any(kind == _BYTE for _, _, kind in pieces),
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [text for text, _, kind in pieces if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every pair that joins to a piece; the best-scored piece first, as sentencepiece joins."""
    normal = {text: i for i, (text, _, kind) in enumerate(pieces) if kind == _NORMAL}
    found = [
        (-pieces[i][1], i, at)
        for text, i in normal.items()
        for at in range(1, len(text))
        if text[:at] in normal and text[at:] in normal
    ]
    return [(pieces[i][0][:at], pieces[i][0][at:]) for _, i, at in sorted(found)]


def _piece(value: Any) -> tuple[str, float, int]:
    fields = dict(_fields(value))
    return fields[1].decode(), fields.get(2, 0.0), fields.get(3, _NORMAL)


def _last(parts: list[tuple[int, Any]], number: int) -> bytes:
    found: bytes = next((value for n, value in reversed(parts) if n == number), b"")
    return found


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field: whole numbers, floats, and bytes of anything longer."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: Any
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = struct.unpack_from("<d" if kind == 1 else "<f", data, at)[0], at + size
        else:
            raise ValueError(f"field of kind {kind}")
        if at > len(data):
            raise ValueError("cut off")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number without end")
