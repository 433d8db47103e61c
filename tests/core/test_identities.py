"""Identities between estimators, their expectations and their variances, by summing over every group."""

from __future__ import annotations

import itertools
from math import comb

import pytest
import torch
from tabular_policy import (
    COMPLETIONS,
    LENGTHS,
    MASK,
    Problem,
    cosine,
    entropies_of,
    expected_gradient,
    logprobs_of,
    probabilities_of,
    relative_error,
    score_norms_of,
    scores_of,
)

from tokenrl.core import Estimator
from tokenrl.core.losses import along_path, full_path, k1, k2_sequence

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Gradients:
    """The gradient [M, 21] of each possible group of one prompt, and its chance [M]."""

    def __init__(self, e: Estimator, problem: Problem, size: int) -> None:
        theta = problem.logits[0]
        choices = torch.cartesian_prod(*[torch.arange(15)] * size).reshape(-1, size)
        self.chance = probabilities_of(theta)[choices].prod(-1)

        def weigh(y: torch.Tensor) -> torch.Tensor:
            mask = MASK[y]
            advantages = e.advantages(
                problem.rewards[0, y],
                mask,
                group_size=size if size > 1 else None,
                score_norms=score_norms_of(theta)[y],
            ).policy
            advantages = advantages[:, None] if advantages.ndim == 1 else advantages
            return e.token_weights(mask, max_length=3) * advantages

        weights = torch.vmap(weigh)(choices)  # [M, n, 3]
        self.each = torch.einsum("mnt,mntd->md", weights, scores_of(theta)[choices])
        self.mean = self.chance @ self.each
        self.variance = float(self.chance @ (self.each - self.mean).square().sum(-1))  # the trace


def parts(problem: Problem) -> tuple[torch.Tensor, ...]:
    """p [15], R [15], S [15, 21] and the token scores [15, 3, 21]."""
    s = scores_of(problem.logits[0])
    return probabilities_of(problem.logits[0]), problem.totals[0], s.sum(1), s


def trace(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return p @ (x - p @ x).square().sum(-1)


@pytest.mark.parametrize("seed", [20, 21])
def test_variance_of_reinforce_falls_with_the_rows(seed: int) -> None:
    problem, e = Problem.random(seed), Estimator(baseline="none")
    one = Gradients(e, problem, 1).variance
    for rows in (2, 3):
        assert Gradients(e, problem, rows).variance == pytest.approx(one / rows, rel=1e-10)


@pytest.mark.parametrize("size", [2, 3])
def test_variance_of_rloo_is_that_of_a_u_statistic(size: int) -> None:
    problem = Problem.random(22)
    p, r, score, _ = parts(problem)
    z1 = trace(p, (r - p @ r)[:, None] * score) / 4
    pairs = (r[:, None] - r)[..., None] * (score[:, None] - score) / 2
    z2 = trace(torch.outer(p, p).flatten(), pairs.reshape(225, 21))
    wanted = 2 / (size * (size - 1)) * (2 * (size - 2) * z1 + z2)
    assert Gradients(Estimator(), problem, size).variance == pytest.approx(float(wanted), rel=1e-10)


def test_variance_is_a_parabola_in_a_constant_baseline() -> None:
    problem = Problem.random(23)
    p, r, score, _ = parts(problem)
    norm = score.square().sum(-1)
    best = float(p @ (norm * r) / (p @ norm))

    def variance(b: float) -> float:
        return Gradients(Estimator(baseline="constant", baseline_constant=b), problem, 1).variance

    for b in (-1.0, 0.0, float(p @ r), 2.0):
        assert variance(b) - variance(best) == pytest.approx((b - best) ** 2 * float(p @ norm), rel=1e-9)


@pytest.mark.parametrize("kind", ["graded", "dense"])
def test_variance_is_a_parabola_in_a_baseline_of_each_timestep(kind: str) -> None:
    """Through a function of the user's: b_t* = E[(S . s_t) R] / E|s_t|^2."""
    problem = Problem.random(24, kind=kind)
    p, r, score, s = parts(problem)
    norms = torch.einsum("y,ytd->t", p, s.square())
    best = torch.einsum("y,yd,ytd,y->t", p, score, s, r) / norms

    def variance(b: torch.Tensor) -> float:
        return Gradients(
            Estimator(baseline=lambda totals, mask, **_: b.expand(mask.shape)), problem, 1
        ).variance

    for b in (torch.zeros(3), torch.tensor([1.0, -0.5, 0.2]), best + 0.1):
        b = b.double()
        wanted = float(((b - best).square() * norms).sum())
        assert variance(b) - variance(best) == pytest.approx(wanted, rel=1e-9)


def in_proportion(seed: int) -> tuple[Problem, torch.Tensor]:
    """A problem and rows that hold each completion in exact proportion: the limit of large groups."""
    flat = torch.zeros(1, 7, 3, dtype=torch.double)
    problem = Problem(flat, flat, Problem.random(seed).rewards)
    return problem, torch.arange(15).repeat_interleave((27 * probabilities_of(flat[0])).round().long())


def test_baselines_of_large_groups_are_the_optima() -> None:
    problem, rows = in_proportion(25)
    p, r, score, s = parts(problem)
    norms = score_norms_of(problem.logits[0])
    torch.testing.assert_close(norms, s.square().sum(-1), **CLOSE)

    def baseline(**fields: object) -> torch.Tensor:
        e = Estimator(leave_one_out=False, **fields)
        kwargs = {"group_size": len(rows), "score_norms": norms[rows]}
        return r[rows, None] - e.advantages(r[rows], MASK[rows], **kwargs).policy.reshape(len(rows), -1)

    norm = score.square().sum(-1)
    torch.testing.assert_close(norm, norms.sum(-1), **CLOSE)  # prefixes share no logits here
    scalar = p @ (norm * r) / (p @ norm)
    torch.testing.assert_close(baseline(baseline="optimal"), scalar.expand(27, 1), **CLOSE)
    by_length = p @ (LENGTHS * r) / (p @ LENGTHS.double())
    torch.testing.assert_close(baseline(baseline="opo"), by_length.expand(27, 1), **CLOSE)
    live = MASK[rows].bool()
    for form, w in (("per_timestep", norms), ("cumulative", norms.cumsum(-1) * MASK)):
        wanted = (p @ (w * r[:, None])) / (p @ w)
        got = baseline(baseline="optimal", optimal_form=form, returns="reward_to_go")
        torch.testing.assert_close(got[live], wanted.expand(27, 3)[live], **CLOSE)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("preset", ["opo", "otb"])
def test_the_papers_form_is_biased_and_leaving_one_out_is_exact(preset: str, size: int) -> None:
    problem = Problem.random(1)
    target = problem.target()
    paper = expected_gradient(Estimator.preset(preset), problem, size)
    assert cosine(paper, target) < 0.999
    assert relative_error(expected_gradient(Estimator.preset(f"{preset}_loo"), problem, size), target) < 1e-10


def test_equal_lengths_make_opo_a_plain_mean() -> None:
    rewards = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    mask = torch.ones(6, 4)
    for loo, twin in ((True, "rloo"), (False, "group_mean")):
        a = Estimator(baseline="opo", leave_one_out=loo).advantages(rewards, mask, group_size=3).policy
        b = Estimator(baseline=twin).advantages(rewards, mask, group_size=3).policy
        torch.testing.assert_close(a, b, **CLOSE)


def test_opo_and_optimal_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0])
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    opo = Estimator(baseline="opo").advantages(rewards, mask, group_size=3).policy
    torch.testing.assert_close(opo, torch.tensor([1 - 16 / 5, 2 - 13 / 4, 4 - 5 / 3]))
    norms = torch.tensor([[1.0, 9, 9], [2, 3, 9], [4, 5, 6]])  # 9 is padding
    e = Estimator(baseline="optimal", returns="reward_to_go", optimal_form="per_timestep")
    each = e.advantages(rewards, mask, group_size=3, score_norms=norms).policy
    # at t = 0 the others; at t = 1 the other one that still acts; at t = 2 no row acts, so the last such mean
    wanted = [[1 - 20 / 6, 0, 0], [2 - 17 / 5, 2 - 4, 0], [4 - 5 / 3, 4 - 2, 4 - 2]]
    torch.testing.assert_close(each, torch.tensor(wanted))
    e = Estimator(baseline="optimal", returns="reward_to_go", optimal_form="cumulative", leave_one_out=False)
    each = e.advantages(rewards, mask, group_size=3, score_norms=norms).policy
    wanted = [[1 - 21 / 7, 0, 0], [2 - 3, 2 - 46 / 14, 0], [4 - 3, 4 - 46 / 14, 0]]
    torch.testing.assert_close(each, torch.tensor(wanted))


def test_loo_std_multiplies_each_gradient_by_the_mean_of_its_divisor() -> None:
    problem, size, eps = Problem.random(27), 3, 0.1
    p, r, _, _ = parts(problem)
    mean = sum(
        p[i] * p[j] / (torch.stack([r[i], r[j]]).std() + eps)
        for i, j in itertools.product(range(15), repeat=2)
    )
    found = expected_gradient(Estimator.preset("loo_std"), problem, size)
    assert relative_error(found, mean * problem.target()) < 1e-10


def test_other_groups_std_multiplies_each_gradient_by_the_mean_of_its_divisor() -> None:
    problem = Problem.random(28, prompts=2)
    found = expected_gradient(Estimator.preset("other_groups_std"), problem, 2)
    for x in (0, 1):
        p, r = probabilities_of(problem.logits[1 - x]), problem.totals[1 - x]
        mean = sum(
            p[i] * p[j] / (torch.stack([r[i], r[j]]).std() + 0.1) for i in range(15) for j in range(15)
        )
        torch.testing.assert_close(found[x], mean * problem.target()[x], **CLOSE)


def w_of_p(p: float, size: int, **fields: object) -> float:
    """E[g] / grad p of a single yes or no, made of the estimator's own advantages."""
    e = Estimator(**({"baseline": "group_mean", "scale": "group_std", "scale_eps": 1e-9} | fields))
    total = 0.0
    for k in range(1, size):
        rewards = (torch.arange(size) < k).double()
        advantages = e.advantages(rewards, torch.ones(size, 1), group_size=size).policy
        total += comb(size, k) * p**k * (1 - p) ** (size - k) * float((advantages * (rewards - p)).mean())
    return total / (p * (1 - p))


def test_group_std_weighs_difficulty_as_stated() -> None:
    for p, factors in ((0.1, (0.21, 0.44, 0.65, 0.83)), (0.5, (0.35, 0.70, 0.87, 0.94))):
        for size, factor in zip((2, 4, 8, 16), factors, strict=True):
            assert w_of_p(p, size) * (p * (1 - p)) ** 0.5 == pytest.approx(factor, abs=0.006)
    for size, ratio in ((2, 1.00), (8, 1.25), (256, 1.66)):
        assert w_of_p(0.1, size) / w_of_p(0.5, size) == pytest.approx(ratio, abs=0.006)
    for p in (0.1, 0.5, 0.8):  # with groups of two the weight does not depend on p
        assert w_of_p(p, 2) == pytest.approx(0.5**0.5) and w_of_p(p, 2, scale_ddof=0) == pytest.approx(1.0)


@pytest.mark.parametrize(("size", "ratio"), [(2, 0.90), (4, 0.85), (16, 0.94)])
def test_whitening_weighs_hard_prompts_down_in_small_steps(size: int, ratio: float) -> None:
    """Two prompts of one yes or no each, p = .1 and .5: the weight of the first relative to the second."""
    e = Estimator(baseline="group_mean", scale="token_whiten", scale_eps=1e-8)
    chances, weights = (0.1, 0.5), [0.0, 0.0]
    for k in itertools.product(range(size + 1), repeat=2):
        rewards = torch.cat([torch.arange(size) < n for n in k]).double()
        advantages = e.advantages(rewards, torch.ones(2 * size, 1), group_size=size).policy
        pairs = zip(k, chances, strict=True)
        chance = torch.tensor([comb(size, n) * p**n * (1 - p) ** (size - n) for n, p in pairs]).prod()
        for x, p in enumerate(chances):
            rows = slice(x * size, (x + 1) * size)
            slope = (advantages[rows] * (rewards[rows] - p)).mean()
            weights[x] += float(chance * slope) / (p * (1 - p))
    assert weights[0] / weights[1] == pytest.approx(ratio, abs=0.006)


def test_pairs_turn_rewards_into_signs() -> None:
    rewards = torch.tensor([0.3, 7.0, 5.0, -2.0], dtype=torch.double)
    e = Estimator.preset("grpo", scale_eps=0.0)
    got = e.advantages(rewards, torch.ones(4, 2), group_size=2).policy
    torch.testing.assert_close(got, torch.tensor([-1.0, 1, 1, -1], dtype=torch.double) / 2**0.5)


def test_a_term_in_the_loss_is_not_rescaled_with_the_advantage() -> None:
    problem, beta = Problem.random(29), 0.4
    target, penalty = problem.target(), problem.target() - problem.target(beta)
    e = Estimator(baseline="group_mean", beta=beta, kl_placement="loss", kl_estimator="full_path")
    assert e.bias_status == "biased"
    assert relative_error(expected_gradient(e, problem, 3), target * 2 / 3 - penalty) < 1e-10


def test_the_paths_of_kl_and_entropy_token_by_token() -> None:
    problem = Problem.random(30)
    logp, ref = logprobs_of(problem.logits[0]), logprobs_of(problem.reference[0])
    ratio = logp - ref
    assert torch.equal(full_path(logp, ref), k1(logp, ref))
    torch.testing.assert_close(k2_sequence(logp, ref).sum(-1), ratio.sum(-1).square() / 2, **CLOSE)
    slopes = {
        full_path: ratio.flip(-1).cumsum(-1).flip(-1),
        k2_sequence: ratio.sum(-1, keepdim=True).expand(15, 3),
    }
    for f, wanted in slopes.items():
        slope = torch.func.grad(lambda x, f=f: f(x, ref).sum())(logp)
        torch.testing.assert_close(slope, wanted, **CLOSE)
    h = entropies_of(problem.logits[0])
    assert torch.equal(along_path(h, logp), h)
    slope = torch.func.grad(lambda x: along_path(h, x).sum())(logp)
    torch.testing.assert_close(slope, h.flip(-1).cumsum(-1).flip(-1) - h, **CLOSE)


@pytest.mark.parametrize("lam", [0.0, 0.6])
def test_gae_is_exact_with_the_exact_value(lam: float) -> None:
    for kind in ("dense", "graded"):
        problem = Problem.random(31, kind=kind)
        e = Estimator(baseline="value", returns="gae", lam=lam)
        found = expected_gradient(e, problem, 1, values=problem.exact_values())
        assert relative_error(found, problem.target()) < 1e-10
        wrong = expected_gradient(e, problem, 1)
        assert cosine(wrong, problem.target()) < 0.999


def test_shrinkage_mixes_two_means_that_leave_the_row_out() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 14.0, 5.0, 5.0], dtype=torch.double)
    mask = torch.ones(6, 2)
    e = Estimator(baseline="shrinkage", shrinkage_weight=0.25)
    got = rewards - e.advantages(rewards, mask, group_size=2).policy
    loo, elsewhere = [3, 1, 14, 10, 5, 5], [8.5, 8.5, 3.5, 3.5, 7, 7]
    wanted = [0.25 * a + 0.75 * b for a, b in zip(loo, elsewhere, strict=True)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.double))


def test_the_weight_of_shrinkage_comes_from_the_other_prompts() -> None:
    def shrunk(totals):
        e, mask = Estimator(baseline="shrinkage"), torch.ones(totals.numel(), 1)
        return totals - e.advantages(totals.flatten(), mask, group_size=5).policy.reshape(totals.shape)

    totals = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    totals = totals + torch.arange(4)[:, None]
    baselines = shrunk(totals)
    others = totals[1:]
    within, means = others.var(1).mean(), others.mean(1)
    between = (means.var() - within / 5).clamp(min=0)
    lam = between / (between + within / 4)
    assert 0.2 < lam < 1
    wanted = lam * (totals[0].sum() - totals[0]) / 4 + (1 - lam) * means.mean()
    torch.testing.assert_close(baselines[0], wanted, **CLOSE)
    for i in range(20):  # a row's own return plays no part, that of every other row does
        moved = totals + torch.nn.functional.one_hot(torch.tensor(i), 20).reshape(4, 5)
        change = (shrunk(moved) - baselines).flatten().abs()
        assert change[i] < 1e-14 and (change > 1e-6).sum() == 19
    alike = torch.zeros(4, 5, dtype=torch.double)
    alike[:, 0], alike[:, 1] = 1, -1  # equal means of all prompts
    torch.testing.assert_close(shrunk(alike + 3), torch.full((4, 5), 3.0, dtype=torch.double))


def test_completions_of_the_tabular_policy_are_complete() -> None:
    assert len(COMPLETIONS) == 15
    total = sum(probabilities_of(Problem.random(s).logits[0]).sum() for s in range(3))
    assert float(total) == pytest.approx(3.0)
