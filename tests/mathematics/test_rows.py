"""Which tokens are actions, and which rows are learnt from."""

from __future__ import annotations

import pytest
import torch
from refusals import refused

from tokenrl.core import Estimator
from tokenrl.core.rows import completion_mask, keep, zero_spread

IDS = torch.tensor([[5, 2, 2, 2], [5, 3, 6, 2], [5, 6, 7, 8], [2, 2, 2, 2]])


REWARDS = torch.tensor([1.0, 1, 2, 3, torch.nan, 5, 4, 4])
VALID = ~REWARDS.isnan()


def test_groups_without_spread():
    assert zero_spread(REWARDS, 2, VALID).tolist() == [True, False, True, True]
    assert zero_spread(REWARDS, 4, VALID).tolist() == [False, False]
    dense = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert zero_spread(dense, 2, torch.ones(2).bool()).tolist() == [True]
    with refused("group_size is None"):
        zero_spread(REWARDS, None, VALID)


@pytest.mark.parametrize(
    ("ends", "lengths", "wanted"),
    [
        (
            (2, 3),
            None,
            [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
        ),  # the docstring's example
        ((), None, [[1] * 4] * 4),
        ((2, 3), [4, 1, 3, 0], [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]),
    ],
)
def test_the_first_end_is_the_last_action(ends, lengths, wanted):
    given = None if lengths is None else torch.tensor(lengths)
    assert completion_mask(IDS, ends, given).int().tolist() == wanted


def test_what_is_kept():
    truncated = torch.tensor([True, False, True, False] * 2)
    spread = torch.tensor([False] * 2 + [True] * 2 + [False] * 4)
    table = [
        ({}, VALID, VALID),
        ({"masks_truncated": True}, VALID, VALID & ~truncated),
        ({"skips_equal_groups": True}, spread, spread),
    ]
    for fields, *wanted in table:
        given = {"masks_truncated": False, "skips_equal_groups": False, **fields}
        given |= {"group_size": 2, "valid": VALID, "truncated": truncated}
        counted, mask = keep(REWARDS, torch.ones(8, 2), **given)
        for found, rows in zip((counted, mask.any(1)), wanted, strict=True):
            assert torch.equal(found, rows), fields
    with refused("truncated"):
        Estimator(truncations="mask").loss_terms(
            REWARDS, torch.ones(8, 2), group_size=2, max_length=2
        )


def test_the_loss_compares_other_rows_than_it_learns_from():
    """A group of equal rewards is in the mean of the step, and a masked row is not among the tokens."""
    axes = {"aggregation": "token_mean", "truncations": "mask", "zero_spread": "drop"}
    given = {
        "group_size": 2,
        "max_length": 2,
        "truncated": torch.tensor([False, True, False, False]),
    }
    rewards = torch.tensor([1.0, 0.0, 3.0, 3.0])
    terms = Estimator(baseline="batch_mean", **axes).loss_terms(rewards, torch.ones(4, 2), **given)
    assert terms.advantages.tolist() == [-0.75, -1.75, 1.25, 1.25]
    assert terms.weights.tolist() == [[0.5, 0.5], *[[0.0, 0.0]] * 3]
