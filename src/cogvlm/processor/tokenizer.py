"""Text <-> token ids, and text from a stream of ids.

Knows nothing about images or prompt formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from ..errors import CheckpointError
from .sentencepiece import read_sentencepiece
from .tiktoken import is_rank_file, read_tiktoken

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
VICUNA = "lmsys/vicuna-7b-v1.5"


class Tokenizer(Protocol):
    """What a :class:`~cogvlm.processor.Processor` needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """Id that starts a row, if there is one."""

    @property
    def eos_id(self) -> int | None:
        """Id that ends an answer, if there is one."""

    @property
    def pad_id(self) -> int | None:
        """Id of padding, if there is one."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: nothing added, and no special token read out of it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""

    def token_id(self, name: str) -> int | None:
        """Id of a token by its string, special ones included."""


class FastTokenizer:
    """A ``tokenizers.Tokenizer`` that never reads a special token out of plain text.

    Args:
        tokenizer: taken over and changed: truncation and padding are switched off.
        bos_id: id that starts a row.
        eos_id: id that ends an answer.
        pad_id: id of padding.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        # A stored truncation would cut long prompts without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id

    @classmethod
    def from_folder(
        cls, folder: str | Path, config: Mapping[str, Any] | None = None
    ) -> FastTokenizer:
        """Load ``tokenizer.json``, or where there is none ``tokenizer.model``
        (sentencepiece, or GLM-4's list of tokens and ranks).

        bos, eos and pad come from ``tokenizer_config.json``; where it names none, from
        ``config``, by default the folder's ``config.json``.

        Raises:
            CheckpointError: both files are missing, or one cannot be read.
        """
        folder = Path(folder)
        path = next((folder / n for n in TOKENIZER_FILES if (folder / n).is_file()), None)
        if path is None:
            raise CheckpointError(
                f"{folder / TOKENIZER_FILES[0]} is missing; put the tokenizer.json of the language "
                "model there"
            )
        return cls.from_file(path, config or read_json(folder / "config.json"))

    @classmethod
    def from_file(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> FastTokenizer:
        """Load a tokenizer file, as :meth:`from_folder` does.

        Args:
            path: ``tokenizer.json``, or a sentencepiece model or a list of tokens and ranks,
                whose names end in ``.model``.
            config: the model's ``config.json``, for ids that ``tokenizer_config.json`` beside the
                file does not name.

        Raises:
            CheckpointError: a file cannot be read.
        """
        path = Path(path)
        names = read_json(path.with_name("tokenizer_config.json")) or {}
        if path.suffix == ".model" and is_rank_file(path):
            tokenizer = read_tiktoken(path, names)
        elif path.suffix == ".model":
            tokenizer, own = read_sentencepiece(path)
            names = {**own, **{key: name for key, name in names.items() if name is not None}}
        else:
            try:
                tokenizer = tokenizers.Tokenizer.from_file(str(path))
            except Exception as exc:  # the library raises plain Exception for what it cannot read
                raise CheckpointError(f"{path} is damaged ({exc}); download it again") from None
        ids = {
            f"{kind}_id": _special_id(tokenizer, names.get(f"{kind}_token"), config or {}, kind)
            for kind in ("bos", "eos", "pad")
        }
        return cls(tokenizer, **ids)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: nothing added, and no special token read out of it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; ids outside the vocabulary give nothing."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def token_id(self, name: str) -> int | None:
        """Id of a token by its string, special ones included."""
        return self._tokenizer.token_to_id(name)

    @property
    def json(self) -> str:
        """Everything, as ``tokenizer.json`` has it."""
        return str(self._tokenizer.to_str())


def open_tokenizer(name: str | Path, config: Mapping[str, Any] | None = None) -> FastTokenizer:
    """A tokenizer that the user names.

    Args:
        name: a folder, a file as in :meth:`FastTokenizer.from_file`, or a hub name whose files
            are in the hub's cache already.
        config: the model's ``config.json``.

    Raises:
        CheckpointError: it is not there, or cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return FastTokenizer.from_file(path, config)
    found = path if path.is_dir() else _in_hub_cache(str(name))
    if found is None:
        raise CheckpointError(
            f"tokenizer {str(name)!r}: no such file or folder; give the tokenizer.json or "
            "tokenizer.model of the language model, or the folder that holds it"
        )
    return FastTokenizer.from_folder(found, config)


def tokenizer_of(folder: Path, config: Mapping[str, Any]) -> FastTokenizer:
    """The tokenizer of a model's folder.

    The released folders of the first generation (CogVLM-17B, CogAgent-18B) hold none: theirs is
    that of Vicuna, which is taken out of the hub's cache if it is there.

    Raises:
        CheckpointError: there is none, and what to fetch.
    """
    if any((folder / name).is_file() for name in TOKENIZER_FILES) or not _of_vicuna(config):
        return FastTokenizer.from_folder(folder)
    if _in_hub_cache(VICUNA) is not None:
        return open_tokenizer(VICUNA, config)
    raise CheckpointError(
        f"{folder} has no tokenizer, as released: fetch Vicuna's with 'hf download {VICUNA} "
        "tokenizer.model tokenizer_config.json', or name one with --tokenizer (in Python: "
        "tokenizer=)"
    )


def _of_vicuna(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of the first generation."""
    later = {"num_multi_query_heads", "multi_query_group_num", "language_model"}
    return "vision_config" in config and not later & config.keys()


def _in_hub_cache(name: str) -> Path | None:
    """The folder of a hub model that holds a tokenizer, if it was fetched before."""
    from huggingface_hub import errors, try_to_load_from_cache

    for file in TOKENIZER_FILES:
        try:
            found = try_to_load_from_cache(name, file)
        except (errors.HFValidationError, OSError):
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; ``None`` if there is no such file.

    Raises:
        CheckpointError: the file is no JSON object, or cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read ({exc}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _special_id(
    tokenizer: tokenizers.Tokenizer, name: Any, config: Mapping[str, Any], kind: str
) -> int | None:
    if isinstance(name, dict):
        name = name.get("content")
    found = tokenizer.token_to_id(name) if isinstance(name, str) else None
    if found is not None:
        return int(found)
    value = config.get(f"{kind}_token_id")
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_HELD = 3  # an unfinished character of UTF-8 has at most three bytes
_WINDOW = 16  # tokens


class Detokenizer:
    """Text from ids that come one by one.

    :meth:`add` returns what is certain: a character whose bytes are spread over several tokens
    comes with the last of them.  The pieces and :meth:`finish` together are the decoded whole.
    A step decodes at most ``_WINDOW`` tokens a few times, however long the answer is.

    The window, with a character of three bytes in the making::

        tokens   " red"   " bus"   E2   82
                 context           unfinished: decodes to a replacement character, held back
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # leading ids whose text is given out; some decoders need what precedes
        self._given = 0  # characters of the window's text that are given out

    def add(self, token: int) -> str:
        """Take one id, return the text that it makes certain (often ``""`` for part of one)."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        if len(self._ids) - self._context > _HELD:
            # No character takes so long: these bytes are broken, all but the last few.
            held = min(held, _HELD)
        piece = text[self._given : len(text) - held]
        self._given += len(piece)
        if piece and not held:
            self._drop(self._context)
            self._context = len(self._ids)
        elif len(self._ids) >= _WINDOW:
            # Broken bytes or unseen tokens without end.  What is held back is kept: one replacement
            # character stands for at most three bytes.
            self._drop(len(self._ids) - 3 * _HELD)
            self._context = 0
        return piece

    def finish(self) -> str:
        """Return what is still held back, an unfinished character included."""
        piece = self._tokenizer.decode(self._ids)[self._given :]
        self._given += len(piece)
        return piece

    def _drop(self, count: int) -> None:
        pending = len(self._tokenizer.decode(self._ids)) - self._given
        del self._ids[:count]
        self._given = max(0, len(self._tokenizer.decode(self._ids)) - pending)
