"""Routing, position ids and blocks, shown as small pictures."""

from __future__ import annotations

import pytest
import torch

from cogvlm.errors import InputError
from cogvlm.models.positions import (
    Route,
    block_ids,
    expert_mask,
    flat_positions,
    image_blocks,
    shared_positions,
    tie_positions,
)


def types(picture: str) -> torch.Tensor:
    return torch.tensor([[int(c == "V") for c in row.split()] for row in picture.splitlines()])


def digits(picture: str) -> list[list[int]]:
    return [[int(c) for c in row.split()] for row in picture.splitlines()]


def test_one_image() -> None:
    t = types("L V V V V V V L L")
    assert expert_mask(t).long().tolist() == digits("0 1 1 1 1 1 0 0 0")
    assert shared_positions(t).tolist() == digits("0 1 2 2 2 2 3 4 5")
    assert flat_positions(t).tolist() == digits("0 1 2 3 4 5 6 7 8")


def test_two_images_apart_and_image_last() -> None:
    t = types("L V V V V L V V V V")
    assert expert_mask(t).long().tolist() == digits("0 1 1 1 0 0 1 1 1 0")
    assert shared_positions(t).tolist() == digits("0 1 2 2 3 4 5 6 6 7")
    assert block_ids(t).tolist() == [[-1, 0, 0, 0, 0, -1, 1, 1, 1, 1]]


def test_back_to_back_blocks_share_one_id_as_released() -> None:
    t = types("L V V V V V V V V L")  # two blocks of two patches
    assert shared_positions(t).tolist() == digits("0 1 2 2 2 2 2 2 3 4")


def test_padding_shifts_the_shared_positions_by_one() -> None:
    t = types("L L L V V V V L\nL V V V V L L L")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    assert shared_positions(t, mask).tolist() == digits("0 0 1 2 3 3 4 5\n0 1 2 2 3 4 5 6")
    assert flat_positions(t, mask).tolist() == digits("0 0 0 1 2 3 4 5\n0 1 2 3 4 5 6 7")


def test_rope_tie_vectors() -> None:
    """h=2, w=3 after position 3: patch (1,1) at (7,6), patch (2,3) at (11,12), next text 15."""
    t = types("L L L V V V V V V V V L")
    tie = tie_positions(t, None, [(2, 3)])
    assert tie[:, 0, 3].tolist() == [3, 3]  # begin marker, position L
    assert tie[:, 0, 4].tolist() == [7, 6]
    assert tie[:, 0, 9].tolist() == [11, 12]
    assert tie[:, 0, 10].tolist() == [15, 15]
    assert tie[:, 0, 11].tolist() == [16, 16]


def test_rope_tie_takes_images_row_by_row() -> None:
    t = types("L L V V V V\nL V V V L L")
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    tie = tie_positions(t, mask, [(1, 2), (1, 1)])
    assert tie[0].tolist() == [[0, 0, 1, 4, 4, 7], [0, 1, 3, 5, 6, 7]]
    assert tie[1].tolist() == [[0, 0, 1, 3, 5, 7], [0, 1, 3, 5, 6, 7]]


def test_images_that_do_not_fit_the_row_are_refused() -> None:
    with pytest.raises(InputError, match="4 image tokens, its images need 6"):
        image_blocks([0, 1, 1, 1, 1, 0], [(2, 2)])


@pytest.mark.parametrize("seed", range(8))
def test_route_joins_what_it_split(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(3, 11, generator=generator) < [0.5, 0.0, 1.0, 0.1][seed % 4]
    x = torch.randn(3, 11, 5, generator=generator)
    route = Route.of(experts)
    grouped = route.split(x)
    assert route.n_language == int((~experts).sum())
    torch.testing.assert_close(grouped[: route.n_language], x[~experts], rtol=0, atol=0)
    torch.testing.assert_close(grouped[route.n_language :], x[experts], rtol=0, atol=0)
    torch.testing.assert_close(route.join(grouped), x, rtol=0, atol=0)


def test_route_without_images_copies_nothing() -> None:
    x = torch.randn(2, 4, 3)
    route = Route.of(torch.zeros(2, 4, dtype=torch.bool))
    assert route.split(x).data_ptr() == x.data_ptr()
    assert route.join(route.split(x)).data_ptr() == x.data_ptr()
