"""Muon: its update is orthogonal, agrees with torch's own, and shares the loop with AdamW."""

from __future__ import annotations

import torch
from torch import nn

from cogvlm.train.loop import is_hidden_matrix
from cogvlm.train.muon import Muon, orthogonal


def test_singular_values_come_near_one_and_directions_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 30), (30, 12)):
        matrix = torch.randn(shape, generator=generator)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
        turned = u.T @ orthogonal(matrix) @ v.T  # nearly diagonal, all positive
        assert float(turned.diagonal().min()) > 0.5
        assert float((turned - turned.diagonal().diag()).abs().max()) < 1e-4 * float(s.max())


def test_update_is_that_of_torch_to_the_rounding_of_bfloat16() -> None:
    generator = torch.Generator().manual_seed(1)
    start, gradients = (
        torch.randn(8, 20, generator=generator),
        torch.randn(3, 8, 20, generator=generator),
    )
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.1, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
    assert float((ours - start).detach().abs().mean()) > 0.02


def test_only_matrices_inside_layers_are_its_own() -> None:
    matrix, vector = torch.zeros(3, 4), torch.zeros(4)
    assert is_hidden_matrix("transformer.layers.2.mlp.fc1.weight", matrix)
    assert not is_hidden_matrix("transformer.layers.2.mlp.fc1.bias", vector)
    assert not is_hidden_matrix("head.weight", matrix)
