"""Several rows in one sequence that do not see each other: no padding, the same loss.

Knows nothing about models: they get the place of each token in its own row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError
from ..processor import Batch, Encoded, Processor
from ..processor.encode import IGNORED, Ids


def bins(rows: Sequence[Encoded], tokens: int) -> list[list[Encoded]]:
    """Rows in groups of at most ``tokens`` tokens: the longest first, each where it fits first."""
    groups: list[list[Encoded]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        length = len(row.input_ids)
        place = next((i for i, left in enumerate(room) if left >= length), len(groups))
        if place == len(groups):
            groups.append([])
            room.append(tokens)
        groups[place].append(row)
        room[place] -= length
    return groups


def packed(processor: Processor, rows: Sequence[Encoded]) -> tuple[Batch, Ids]:
    """Rows end to end as a batch of one, and the place of each token in its own row.

    Returns:
        The batch, and ``int64[1, L]``.

    Raises:
        ConfigError: CogAgent, whose layers read one large picture for a whole sequence.
    """
    if processor.cross_pixels is not None:
        raise ConfigError("packing: CogAgent reads one large picture a row; leave packing out")
    labels = []
    for row in rows:
        assert row.labels is not None
        # Nothing before a row predicts its first token.
        labels.append(np.concatenate(([IGNORED], row.labels[1:])))
    whole = Encoded(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.token_type_ids for row in rows]),
        [pixels for row in rows for pixels in row.pixel_values],
        np.concatenate(labels),
    )
    places = np.concatenate([np.arange(len(row.input_ids)) for row in rows])
    return processor.batch([whole]), places[None]
