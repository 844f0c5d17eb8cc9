"""What may be reused, and how much of it is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cogvlm.engine.reuse import Features, Prefixes, Trace, common, trace
from cogvlm.processor.image import digest

A, B = b"a" * 16, b"b" * 16


def seen(*parts: int | bytes, block: int = 4) -> Trace:
    """Text of so many tokens, or pictures of ``block`` tokens, in order."""
    types: list[int] = []
    pictures = [(block, part) for part in parts if isinstance(part, bytes)]
    for part in parts:
        types += [1] * block if isinstance(part, bytes) else [0] * part
    kinds = np.array(types, dtype=np.int64)
    ids = np.where(kinds == 1, 4, np.arange(len(kinds)) + 10)
    places = np.arange(len(kinds))[None]
    return trace(ids, kinds, kinds.astype(bool), pictures, places)


def changed(old: Trace, place: int, column: int = 0) -> Trace:
    new = old.copy()
    new[place, column] += 1
    return new


@pytest.mark.parametrize(
    ("new", "old", "count"),
    [
        (seen(9), seen(9), 8),  # one token is left over
        (seen(9), seen(20), 8),
        (seen(20), seen(9), 9),
        (changed(seen(20), 5), seen(20), 5),
        (changed(seen(20), 0), seen(20), 0),
        (seen(2, A, 5), seen(2, A, 9), 10),
        (seen(2, A, 5), seen(2, B, 5), 2),
        (changed(seen(2, A, 5), 3, 5), seen(2, A, 5), 2),  # a position within the picture
        (changed(seen(2, A, 5), 6), seen(2, A, 5), 6),  # right behind it
        (seen(2, A, B, 5), seen(2, A, 5), 2),  # what follows the picture is image here
        (seen(2, A, 5), seen(2, A, B, 5), 2),  # and there
        (seen(2, A, 3, B, 5), seen(2, A, 3, A, 5), 9),
        (seen(3, A), seen(3, A), 3),  # the token left over is of the picture
        (seen(2, A, 5), seen(2, A), 6),
    ],
)
def test_what_two_sequences_share(new: Trace, old: Trace, count: int) -> None:
    assert common(new, old) == count


def layers(tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros(2, tokens, 4), torch.zeros(2, tokens, 4)) for _ in range(3)]


BYTES = 3 * 2 * 2 * 4 * 4  # a token


def test_the_longest_unused_goes_first_and_bytes_are_bounded() -> None:
    store = Prefixes(100 * BYTES)
    chains = [changed(seen(40), 0) + 1000 * i for i in range(3)]
    for chain in chains[:2]:
        assert store.wants(chain, 40 * BYTES)
        store.put(chain, layers(40))
    assert store.bytes == 80 * BYTES
    assert store.find(chains[0])[0] == 39  # used: the other one is older now
    store.put(chains[2], layers(40))
    assert (len(store), store.bytes) == (2, 80 * BYTES)
    assert [store.find(c)[0] for c in chains] == [39, 0, 39]
    assert not store.wants(chains[1], 101 * BYTES)
    store.clear()
    assert (len(store), store.bytes, store.find(chains[0])[0]) == (0, 0, 0)


def test_a_longer_one_takes_the_place_of_its_beginning() -> None:
    store = Prefixes(1000 * BYTES)
    store.put(seen(40), layers(40))
    assert not store.wants(seen(30), 30 * BYTES)
    assert store.wants(seen(60), 60 * BYTES)
    store.put(seen(60), layers(60))
    assert (len(store), store.bytes) == (1, 60 * BYTES)


def test_little_is_not_worth_it() -> None:
    store = Prefixes(1000 * BYTES)
    store.put(seen(40), layers(40))
    assert store.find(changed(seen(40), 15))[0] == 0
    assert store.find(changed(seen(40), 16))[0] == 16
    assert not store.wants(seen(15), 15 * BYTES)


def test_pictures_are_told_apart_by_pixels_and_shape() -> None:
    pixels = np.arange(48, dtype=np.float32).reshape(3, 4, 4)
    assert digest(pixels) == digest(pixels.copy())
    assert digest(pixels) != digest(pixels + 1)
    assert digest(pixels) != digest(pixels.reshape(3, 2, 8))
    turned = np.ascontiguousarray(pixels.transpose(0, 2, 1))
    assert digest(pixels.transpose(0, 2, 1)) == digest(turned) != digest(pixels)


def test_features_are_kept_as_long_as_there_is_room() -> None:
    store = Features(3 * 40)
    both = torch.arange(20.0).reshape(2, 10)
    for name, one in zip((A, B), both, strict=True):
        store.put(name, one)
    assert store.bytes == 80
    assert torch.equal(store.get(A), both[0])  # type: ignore[arg-type]
    store.put(b"c", torch.zeros(20))
    assert store.get(B) is None and store.get(A) is not None
    assert store.bytes == 120
    store.put(b"d", torch.zeros(31))  # would not fit at all
    assert (len(store), store.get(b"d")) == (2, None)
