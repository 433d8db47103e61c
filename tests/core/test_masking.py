"""Which tokens are actions."""

from __future__ import annotations

import pytest
import torch

from tokenrl.core.rows import completion_mask, zero_outside

IDS = torch.tensor([[5, 2, 2, 2], [5, 3, 6, 2], [5, 6, 7, 8], [2, 2, 2, 2]])


def test_the_example_of_the_docstring() -> None:
    wanted = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert completion_mask(IDS, (2, 3)).int().tolist() == wanted
    assert completion_mask(IDS, [3]).int().tolist() == [[1] * 4, [1, 1, 0, 0], [1] * 4, [1] * 4]
    assert completion_mask(IDS, ()).all()


def test_lengths_end_rows_that_did_not_end_by_themselves() -> None:
    lengths = torch.tensor([4, 1, 3, 0])
    wanted = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert completion_mask(IDS, (2, 3), lengths).int().tolist() == wanted
    stacked = torch.vmap(lambda ids, n: completion_mask(ids, (2, 3), n))(
        torch.stack([IDS, IDS.flip(0)]), torch.stack([lengths, lengths.flip(0)])
    )
    assert torch.equal(stacked[0], completion_mask(IDS, (2, 3), lengths))
    assert torch.equal(stacked[1], stacked[0].flip(0))


def test_zero_outside_stops_values_and_gradients() -> None:
    x = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    kept = zero_outside(x, torch.tensor([True, False, False]))
    assert kept.tolist() == [1, 0, 0]
    kept.exp().sum().backward()
    assert x.grad.tolist() == [pytest.approx(2.718281828), 0, 0]
