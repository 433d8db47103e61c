"""Ratios: off-policy truth by summing over every group, clips by hand, the correction of a sampler."""

from __future__ import annotations

import pytest
import torch
from tabular_policy import Problem, cosine, expected_gradient, relative_error

from tokenrl.core import Estimator
from tokenrl.errors import Refused

ONE = torch.ones(1, 2, dtype=torch.double)


def moved(problem: Problem) -> torch.Tensor:
    """A sampling policy at a moderate distance."""
    return problem.logits + 0.3 * problem.reference


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
@pytest.mark.parametrize("baseline", ["none", "rloo", "value"])
def test_the_sequence_ratio_is_exact_off_policy_and_the_token_ratio_is_not(baseline, returns) -> None:
    problem = Problem.random(40)
    off = {"behaviour": moved(problem)}

    def found(ratio):
        e = Estimator(baseline=baseline, ratio=ratio, returns=returns, epsilon=1.0, epsilon_high=1e9)
        return expected_gradient(e, problem, 2, **off)

    target = problem.target()
    assert relative_error(found("sequence_product"), target) < 1e-10
    for ratio in ("none", "token", "sequence_mean", "cispo"):
        assert relative_error(found(ratio), target) > 0.01


def test_sequence_ratio_and_token_sum_is_reinforce_on_policy() -> None:
    """And with the mean over tokens the ratio of GSPO has the gradient of sequence_mean."""
    problem = Problem.random(41)
    summed = expected_gradient(Estimator(ratio="sequence_mean", epsilon=3e-4), problem, 2)
    assert relative_error(summed, problem.target()) < 1e-10
    a, b = (
        expected_gradient(Estimator(ratio=ratio, aggregation="sequence_mean"), problem, 2)
        for ratio in ("sequence_mean", "none")
    )
    assert relative_error(a, b) < 1e-10 and cosine(a, summed) < 0.999


def run(log_ratio, advantage, *, mask=ONE, weights=ONE, **fields):
    """Loss and gradient [T] of one row."""
    e = Estimator(baseline="none", **fields)
    logprobs = torch.tensor([log_ratio], dtype=torch.double).requires_grad_()
    loss = e.loss(logprobs, torch.tensor([advantage]), weights, mask, old_logprobs=torch.zeros(1, 2))
    return loss.item(), torch.autograd.grad(loss, logprobs)[0][0].tolist()


def test_ratios_of_a_sequence_by_hand() -> None:
    import math

    tokens = [math.log(1.1), math.log(1.3)]
    mean, product = (1.1 * 1.3) ** 0.5, 1.1 * 1.3
    value, slope = run(tokens, 2.0, ratio="sequence_mean", epsilon=0.5)
    assert value == pytest.approx(-4 * mean) and slope == pytest.approx([-2 * mean] * 2)
    value, slope = run(tokens, 2.0, ratio="sequence_mean", epsilon=0.1)
    assert value == pytest.approx(-4 * 1.1) and slope == [0, 0]
    value, slope = run(tokens, -2.0, ratio="sequence_mean", epsilon=0.1)
    assert slope == pytest.approx([2 * mean] * 2)
    value, slope = run(tokens, 2.0, ratio="sequence_product", epsilon=0.1)
    assert value == pytest.approx(-4 * product) and slope == pytest.approx([-2 * product] * 2)
    # GSPO's own objective, the ratio differentiated through its mean, with its 1/L
    x = torch.tensor(tokens, dtype=torch.double, requires_grad=True)
    (2 * x.mean().exp()).backward()
    _, slope = run(tokens, 2.0, ratio="sequence_mean", epsilon=0.5, weights=ONE / 2)
    assert slope == pytest.approx((-x.grad).tolist())
    half = torch.tensor([[1.0, 0.0]], dtype=torch.double)
    _, slope = run([tokens[0], torch.nan], 2.0, ratio="sequence_mean", epsilon=0.5, mask=half)
    assert slope == pytest.approx([-2.2, 0.0])


def test_cispo_keeps_the_gradient_of_what_it_clips() -> None:
    import math

    tokens = [math.log(0.5), math.log(3.0)]
    _, slope = run(tokens, 2.0, ratio="cispo", epsilon=0.2, epsilon_high=0.5)
    assert slope == pytest.approx([-2 * 0.8, -2 * 1.5])
    assert run([0.0, 0.0], 2.0, ratio="cispo")[1] == [-2.0, -2.0]


def test_dual_clip_bounds_the_pull_of_negative_advantages() -> None:
    import math

    tokens = [math.log(2.0), math.log(4.0)]
    value, slope = run(tokens, -1.0, ratio="token", dual_clip=3.0)
    assert value == pytest.approx(2 + 3) and slope == pytest.approx([2.0, 0.0])
    assert run(tokens, -1.0, ratio="token")[1] == pytest.approx([2.0, 4.0])
    assert run(tokens, 1.0, ratio="token", dual_clip=3.0) == run(tokens, 1.0, ratio="token")


@pytest.mark.parametrize("ratio", ["none", "token"])
def test_importance_weights_against_the_sampler_are_truncated(ratio) -> None:
    e = Estimator(baseline="none", ratio=ratio, importance_cap=1.5, beta=0.1, kl_placement="loss")
    logprobs = torch.tensor([[-1.0, -2.0]], dtype=torch.double).requires_grad_()
    sampler = logprobs.detach() - torch.tensor([[2.0, 0.8]], dtype=torch.double).log()
    arguments = (torch.tensor([3.0]), ONE, ONE)
    given = {"old_logprobs": logprobs.detach(), "ref_logprobs": torch.zeros(1, 2)}
    loss = e.loss(logprobs, *arguments, sampling_logprobs=sampler, **given)
    slope = torch.autograd.grad(loss, logprobs)[0][0].tolist()
    assert slope == pytest.approx([-3 * 1.5 + 0.1, -3 * 0.8 + 0.1])  # the KL is not weighed
    with pytest.raises(Refused, match="sampling_logprobs"):
        e.loss(logprobs, *arguments, **given)


def test_importance_weights_make_one_token_exact_under_another_sampler() -> None:
    """E_q[(p/q) A grad log p] = E_p[A grad log p]."""
    draw = torch.Generator().manual_seed(5)
    logits, other = torch.randn(2, 4, generator=draw, dtype=torch.double)
    rewards = torch.randn(4, generator=draw, dtype=torch.double)
    e = Estimator(baseline="none", importance_cap=1e9)
    q = other.log_softmax(-1)

    def loss(theta):
        logprobs, weights = theta.log_softmax(-1)[:, None], q.exp()[:, None]
        return e.loss(logprobs, rewards, weights, torch.ones(4, 1), sampling_logprobs=q[:, None])

    wanted = torch.func.grad(lambda theta: -(theta.softmax(-1) * rewards).sum())(logits)
    torch.testing.assert_close(torch.func.grad(loss)(logits), wanted, rtol=1e-12, atol=1e-12)


def test_clipped_values() -> None:
    values = torch.tensor([[1.0, 3.0]], dtype=torch.double, requires_grad=True)
    goal, old = torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 2.9]])
    e = Estimator(value_clip=0.5)
    loss = e.critic_loss(values, goal, ONE, old_values=old)
    assert loss.item() == pytest.approx((1.5**2 + 1.0**2) / 2)  # the clipped 0.5 is further off than 1.0
    assert torch.autograd.grad(loss, values)[0].tolist() == [[0.0, 1.0]]
    with pytest.raises(Refused, match="old_values"):
        e.critic_loss(values, goal, ONE)
