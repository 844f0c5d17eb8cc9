"""A head that spells what a strip of print says, straight from the tower: no language model.

Trained by CTC (Graves et al. 2006): every column of patches has two steps, each of which names a
character or none, and a character that is named twice in a row is one::

    column     0     1     2     3          14 pixels each
    steps      C C   a .   . t  t .         '.' = none
    reads      Cat

``N`` images, ``C`` tower width, ``T`` steps.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

ALPHABET = "".join(map(chr, range(0x20, 0x7F)))  # class 0 is none; class i is ALPHABET[i - 1]
STEPS = 2  # of a column of patches
SURE = 0.6  # of what is print, even worn, hardly anything is below, of other things nearly all
_BLOCKS, _REACH = 3, 5  # convolutions, and the columns that each looks at


class CTCHead(nn.Module):
    """Columns of ``tall`` patches, joined and looked at with their neighbours -> characters.

    Args:
        width: of the tower.
        tall: rows of patches in a strip.
        hidden: width inside.
    """

    def __init__(self, width: int, tall: int, hidden: int) -> None:
        super().__init__()
        self.tall = tall
        self.enter = nn.Linear(tall * width, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(_BLOCKS))
        self.convs = nn.ModuleList(
            nn.Conv1d(hidden, hidden, _REACH, padding=_REACH // 2) for _ in range(_BLOCKS)
        )
        self.leave = nn.Linear(hidden, STEPS * (len(ALPHABET) + 1))

    def forward(self, patches: Tensor) -> Tensor:
        """Tower output of strips of one size, ``float[N, P, C]``, row-major -> ``float[N, T, 96]``.

        The values are logits.
        """
        n, count, width = patches.shape
        columns = patches.view(n, self.tall, count // self.tall, width).transpose(1, 2)
        x = self.enter(columns.flatten(2))  # [N, columns, hidden]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + F.gelu(conv(norm(x).transpose(1, 2))).transpose(1, 2)
        return self.leave(x).view(n, -1, len(ALPHABET) + 1)  # type: ignore[no-any-return]


def spelled(classes: list[int]) -> str:
    """The text of the classes of a strip's steps.

    >>> spelled([36, 36, 66, 0, 0, 85, 85, 0])
    'Cat'
    """
    before = [0, *classes]
    return "".join(
        ALPHABET[c - 1] for c, last in zip(classes, before, strict=False) if c and c != last
    )


def certainty(scores: Tensor) -> float:
    """The mean probability of the characters that are named, 0 to 1; 0 where none is.

    Args:
        scores: ``float[T, 96]``, logits.
    """
    best, which = scores.log_softmax(-1).max(-1)
    named = best[which > 0]
    return float(named.mean().exp()) if len(named) else 0.0
