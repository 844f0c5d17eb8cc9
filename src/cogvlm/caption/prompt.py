"""The question put to every picture: a template with fields of the picture.

::

    "{folder}: describe the picture. Known tags: {tags}"  ->  "cats: describe the picture. ..."
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from string import Formatter

from PIL import Image as PILImage

from ..errors import ConfigError, ImageError, InputError
from .pictures import Picture

FIELDS = ("name", "stem", "folder", "width", "height", "tags")
_ORIENTATION = 0x0112  # of EXIF; from 5 on the picture lies on its side
_MOST = 100_000  # bytes of a file of tags


@dataclass(frozen=True)
class Prompt:
    """A template; ``{{`` and ``}}`` are braces.

    Raises:
        ConfigError: no text, an unknown field, a brace alone, or tags without their suffix.
    """

    text: str
    tags_suffix: str | None = None  # of the file beside the picture that {tags} is read from

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ConfigError("the prompt is empty; give a question or a task")
        names = self._fields()
        for name in names:
            if name not in FIELDS:
                near = get_close_matches(name, FIELDS, n=1)
                hint = f"; did you mean {{{near[0]}}}?" if near else ""
                known = " ".join(f"{{{field}}}" for field in FIELDS)
                raise ConfigError(f"prompt: unknown field {{{name}}}{hint}; known: {known}")
        if "tags" in names and not self.tags_suffix:
            raise ConfigError("prompt: {tags} needs --tags-suffix, such as .tags")
        if "tags" not in names and self.tags_suffix:
            raise ConfigError("--tags-suffix is of no use: the prompt has no {tags}")

    def _fields(self) -> set[str]:
        try:
            parts = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ConfigError(f"prompt: {error}; write {{{{ and }}}} for braces") from None
        if any(form or conversion for _, _, form, conversion in parts):
            raise ConfigError("prompt: a field is a name alone, without ':' or '!'")
        return {name for _, name, _, _ in parts if name is not None}

    def fill(self, picture: Picture, folder: Path) -> str:
        """The prompt for one picture of ``folder``.

        Raises:
            ImageError: its size is asked for and cannot be read.
            InputError: its file of tags is missing or unusable.
        """
        fields = self._fields()
        values: dict[str, object] = {
            "name": _shown(picture.path.name),
            "stem": _shown(picture.path.stem),
            "folder": _shown(picture.path.parent.name or folder.resolve().name),
        }
        if fields & {"width", "height"}:
            values["width"], values["height"] = upright_size(picture.path)
        if "tags" in fields:
            values["tags"] = self._tags(picture)
        return self.text.format_map(values)

    def _tags(self, picture: Picture) -> str:
        file = picture.path.with_name(picture.path.stem + (self.tags_suffix or ""))
        try:
            with file.open("rb") as source:
                data = source.read(_MOST + 1)
        except OSError as error:
            raise InputError(f"tags {str(file)!r} cannot be read ({error.strerror})") from None
        if len(data) > _MOST:
            raise InputError(f"tags {str(file)!r} is larger than {_MOST} bytes")
        try:
            return " ".join(data.decode("utf-8-sig").split())
        except UnicodeDecodeError:
            raise InputError(f"tags {str(file)!r} is not UTF-8; save it as UTF-8") from None


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height as the picture is looked at, from its head alone.

    Raises:
        ImageError: there is none.
    """
    try:
        if not path.is_file():
            raise OSError("no regular file")
        with PILImage.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except Exception as error:  # decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split())[:200]
        raise ImageError(f"image {str(path)!r}: its size cannot be read ({reason})") from None
    return (height, width) if turned else (width, height)


def _shown(name: str) -> str:
    """A file's name as text: what is not Unicode in it cannot be asked for."""
    return os.fsencode(name).decode(errors="replace")
