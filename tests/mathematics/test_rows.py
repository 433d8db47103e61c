"""Which tokens are actions, and which rows are learnt from."""

from __future__ import annotations

import pytest
import torch

from tokenrl.core import Estimator
from tokenrl.core.rows import completion_mask, keep, zero_outside, zero_spread
from tokenrl.errors import Refused

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


REWARDS = torch.tensor([1.0, 1, 2, 3, torch.nan, 5, 4, 4])
VALID = ~REWARDS.isnan()


def test_groups_without_spread() -> None:
    assert zero_spread(REWARDS, 2, VALID).tolist() == [True, False, True, True]
    assert zero_spread(REWARDS, 4, VALID).tolist() == [False, False]
    dense = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert zero_spread(dense, 2, torch.ones(2).bool()).tolist() == [True]
    with pytest.raises(Refused, match="group_size is None"):
        zero_spread(REWARDS, None, VALID)


def test_what_is_kept() -> None:
    mask = torch.ones(8, 2)
    truncated = torch.tensor([True, False, True, False] * 2)

    def kept(**fields):
        return keep(Estimator(**fields), REWARDS, mask, group_size=2, valid=VALID, truncated=truncated)

    plain = kept()
    assert torch.equal(plain.compared, VALID) and torch.equal(plain.counted, VALID)
    masked = kept(truncations="mask")
    assert torch.equal(masked.compared, VALID) and torch.equal(masked.counted, VALID)
    assert masked.mask.any(1).tolist() == [False, True, False, True] * 2
    dropped = kept(truncations="drop")
    assert torch.equal(dropped.compared, VALID & ~truncated)
    assert torch.equal(dropped.counted, VALID & ~truncated)
    for name in ("drop", "refill"):
        spread = kept(zero_spread=name)
        assert torch.equal(spread.compared, VALID)
        assert spread.counted.tolist() == [False] * 2 + [True] * 2 + [False] * 4
        assert torch.equal(spread.mask.any(1), spread.counted)
    with pytest.raises(Refused, match="truncated"):
        keep(Estimator(truncations="mask"), REWARDS, mask, group_size=2)
