"""Which rows are learnt from: truncations and groups of equal rewards, by enumeration and by hand."""

from __future__ import annotations

import pytest
import torch
from tabular_policy import (
    IDS,
    LENGTHS,
    Problem,
    cosine,
    expected_gradient,
    probabilities_of,
    relative_error,
)

from tokenrl.core import Estimator
from tokenrl.core.rows import keep, overlong_penalty, zero_spread
from tokenrl.errors import Refused

CUT = (LENGTHS == 3) & (IDS[:, 2] != 0)  # never ended


@pytest.mark.parametrize("size", [2, 3])
def test_masking_truncated_rows_rewards_their_avoidance(size) -> None:
    """grad E[m R] - J grad P(m = 1), m = 1 for rows that ended by themselves."""
    problem = Problem.random(50)
    mean = float(probabilities_of(problem.logits[0]) @ problem.totals[0])
    wanted = problem.gradient(lambda x, r, _: (probabilities_of(x) * ~CUT * (r - mean)).sum())
    found = expected_gradient(Estimator(truncations="mask"), problem, size, truncated=CUT)
    assert relative_error(found, wanted) < 1e-10
    assert cosine(wanted, problem.target()) < 0.999


@pytest.mark.parametrize("size", [2, 3])
def test_dropping_truncated_rows_ascends_the_reward_given_that_none_is(size) -> None:
    """P(K >= 2) grad E[R | not truncated], with K survivors in the group."""
    problem = Problem.random(51)

    def conditional(x, r, _):
        p = probabilities_of(x) * ~CUT
        return (p * r).sum() / p.sum()

    kept = float((probabilities_of(problem.logits[0]) * ~CUT).sum())
    two = 1 - (1 - kept) ** size - size * kept * (1 - kept) ** (size - 1)
    found = expected_gradient(Estimator(truncations="drop"), problem, size, truncated=CUT)
    assert relative_error(found, two * problem.gradient(conditional)) < 1e-10


def chance_of_spread(problem: Problem, x: int, size: int) -> float:
    p, r = probabilities_of(problem.logits[x]), problem.totals[x]
    return 1 - sum(float(p[r == level].sum()) ** size for level in r.unique())


@pytest.mark.parametrize("baseline", ["rloo", "group_mean", "opo", "optimal"])
@pytest.mark.parametrize("size", [2, 3])
def test_dropping_groups_without_spread(baseline, size) -> None:
    """One prompt: the gradient over P(kept)."""
    problem = Problem.random(52, kind="binary")
    dropped = expected_gradient(Estimator(baseline=baseline, zero_spread="drop"), problem, size)
    kept = expected_gradient(Estimator(baseline=baseline), problem, size) / chance_of_spread(problem, 0, size)
    # a step whose only group is dropped has no gradient, so the mean over steps loses P(kept) again
    assert relative_error(dropped / chance_of_spread(problem, 0, size), kept) < 1e-10


def test_dropping_weighs_prompts_by_how_many_others_are_kept() -> None:
    """E[1/kept | the prompt is kept], kept out of B = 2: 1/2 where the other is kept too, else 1."""
    problem, size = Problem.random(53, prompts=2, kind="binary"), 2
    found = expected_gradient(Estimator(zero_spread="drop"), problem, size)
    target = problem.target() * 2  # the gradient of each prompt by itself
    for x in (0, 1):
        other = chance_of_spread(problem, 1 - x, size)
        torch.testing.assert_close(found[x], (other / 2 + 1 - other) * target[x], rtol=1e-10, atol=1e-12)


def test_refilling_with_new_prompts_is_exact_up_to_scale() -> None:
    """A slot takes prompt x with chance P(kept_x)/Z, and its group then has the gradient over P(kept_x)."""
    problem, size = Problem.random(54, prompts=2, kind="binary"), 2
    target = problem.target()
    single = [
        Problem(problem.logits[x : x + 1], problem.reference[x : x + 1], problem.rewards[x : x + 1])
        for x in (0, 1)
    ]
    chances = [chance_of_spread(problem, x, size) for x in (0, 1)]
    given_kept = [
        expected_gradient(Estimator(zero_spread="drop"), s, size)[0] / chance
        for s, chance in zip(single, chances, strict=True)
    ]
    slot = torch.stack([g * c / sum(chances) for g, c in zip(given_kept, chances, strict=True)])
    assert relative_error(slot, target * 2 / sum(chances)) < 1e-10
    same_prompt = torch.stack(given_kept) / 2  # a second try of the prompt that failed
    assert cosine(same_prompt, target) < 1 - 1e-4


def test_a_long_row_is_penalised_before_the_baseline() -> None:
    penalty = overlong_penalty(torch.tensor([0, 6, 7, 8, 9, 10, 12]), 10, 4)
    assert penalty.tolist() == [0, 0, -0.25, -0.5, -0.75, -1, -1]
    rewards, mask = torch.tensor([1.0, 3.0]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    e = Estimator(overlong_buffer=2)
    got = e.advantages(rewards, mask, group_size=2, max_length=4)
    assert got.policy.tolist() == [-3.0, 3.0]
    assert got.returns.tolist() == [[0, 0, 0, 0], [3, 3, 0, 0]]
    problem = Problem.random(55)
    shaped = Problem(
        problem.logits, problem.reference, problem.rewards + overlong_penalty(LENGTHS, 3, 2).double()
    )
    found = expected_gradient(Estimator(overlong_buffer=2), problem, 2)
    assert relative_error(found, shaped.target()) < 1e-10


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
