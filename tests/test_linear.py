"""Layers over int8 and int4 weights: slabs, kernels and packing say the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvlm import linear
from cogvlm.quantize import pieces


def restored(parts: dict[str, Tensor]) -> Tensor:
    """What the folder's layout says: ``float32[N, K]``."""
    if "int8" in parts:
        return parts["int8"].float() * parts["scale"]
    codes = linear.split_codes(parts["int4"]).float()
    group = codes.shape[1] // parts["scale"].shape[1]
    scale, zero = (parts[n].float().repeat_interleave(group, 1) for n in ("scale", "zero"))
    return (codes - 8) * scale + zero


def layer(
    rows: int, columns: int, group: int, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[linear.QuantisedLinear, Tensor, nn.Linear]:
    """A layer, the weights it stands for, and the plain one it was made from."""
    torch.manual_seed(0)
    plain = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    parts = pieces(plain.weight.detach(), group)
    return linear.quantised(plain, parts, dtype, linear.backend()), restored(parts), plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group"), [(192, 256, 128), (64, 96, 32), (50, 40, 0)])
@torch.no_grad()
def test_slabs_multiply_by_the_weights_exactly(
    rows: int, columns: int, group: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, weight, plain = layer(rows, columns, group, bias)
    x = torch.randn(2, 131, columns)
    wanted = F.linear(x, weight, plain.bias)
    if group and not made.restorable():
        pytest.skip("int4 is packed in another way here: kernels serve every input")
    torch.testing.assert_close(made.by_slabs(x), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(made(x), made.by_slabs(x))  # it is a long input
    # Parts and slabs that do not divide evenly.
    monkeypatch.setattr(linear, "_SLAB", 64 * columns)
    monkeypatch.setattr(linear, "_PART", 50 * columns)
    torch.testing.assert_close(made.by_slabs(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [0, 128])
@torch.no_grad()
def test_long_and_short_inputs_agree(group: int, dtype: torch.dtype) -> None:
    made, _, _ = layer(192, 256, group, dtype=dtype)
    x = torch.randn(made.long, 256).to(dtype)
    by_kernel = torch.cat([made(row) for row in x.split(1)])
    assert made(x).dtype == by_kernel.dtype == dtype
    # Outputs are about one; the kernels round to bfloat16, 2**-9 of that, inputs too.
    torch.testing.assert_close(made(x).float(), by_kernel.float(), rtol=0.01, atol=0.01)
    assert torch.equal(made(x[:1]), made.by_kernel(x[:1]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [32, 128])
@torch.no_grad()
def test_the_operator_called_here_is_the_one_of_torchao(group: int, bias: bool) -> None:
    made, _, _ = layer(192, 256, group, bias)
    x = torch.randn(2, 3, 256)
    wanted = F.linear(x.bfloat16(), made.weight).float()
    assert torch.equal(made(x), wanted if made.bias is None else wanted + made.bias)


@pytest.mark.parametrize("group", [0, 128])
@torch.no_grad()
def test_inputs_may_be_views(group: int) -> None:
    made, _, _ = layer(192, 256, group, dtype=torch.bfloat16)
    x = torch.randn(2, 256, made.long).bfloat16()
    for view in (x.transpose(1, 2), x.transpose(1, 2)[:, :1]):
        assert torch.equal(made(view), made(view.contiguous()))


def test_gradients_flow_to_the_input() -> None:
    made, weight, _ = layer(192, 256, 0)
    x = torch.randn(40, 256, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(40, -1), rtol=1e-4, atol=1e-4)


def test_blocks_are_rounded_and_packed_as_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    whole = {group: pieces(weight, group) for group in (0, 128)}
    packed = linear._for_cpu(whole[128])
    monkeypatch.setattr(linear, "_SLAB", 64 * 128)
    monkeypatch.setattr("cogvlm.quantize._BLOCK", 100 * 128)
    for group, parts in whole.items():
        again = pieces(weight, group)
        assert all(torch.equal(parts[name], again[name]) for name in parts)
    assert torch.equal(linear._for_cpu(whole[128])[0], packed[0])


def test_what_cannot_be_unpacked_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, _ = layer(192, 256, 128)
    monkeypatch.setattr(linear, "_halves", lambda: 0)
    x = torch.randn(200, 256)
    with torch.no_grad():
        found = made(x)
        assert torch.equal(found, made.by_kernel(x))
    odd, _, _ = layer(48, 256, 128)  # rows that are packed in another way
    assert not odd.restorable()
