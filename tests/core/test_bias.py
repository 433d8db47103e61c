"""Every declared bias, proven by summing over all groups in float64."""

from __future__ import annotations

from math import comb

import pytest
import torch
from tabular_policy import (
    IDS,
    LENGTHS,
    MASK,
    MAX_LENGTH,
    STATES,
    Problem,
    cosine,
    entropies_of,
    expected_gradient,
    logprobs_of,
    probabilities_of,
    relative_error,
)

from tokenrl.core import Estimator
from tokenrl.core.choices import AXES, CHOICES, FROM_BEST_TO_WORST, KL_EFFECTS
from tokenrl.core.estimator import IN_UNITS_OF_THE_EPISODE
from tokenrl.core.presets import PRESETS

# The axes one by one, over the unbiased defaults.
SINGLE = [
    {axis: name} | ({"returns": "reward_to_go"} if name.startswith("episode") else {})
    for axis in ("baseline", "scale", "aggregation", "ratio")
    for name in AXES[axis]
]
SINGLE += [{"beta": 0.3, "kl_placement": place, "kl_estimator": name} for place, name in KL_EFFECTS]
SINGLE += [
    {"returns": name, "gamma": gamma, "window": 1}
    | ({"baseline": "none"} if name == "episode_normalized" else {})
    for name in AXES["returns"]
    for gamma in (1.0, 0.7)
]
SINGLE += [{"returns": "episode_normalized", "baseline": name} for name in IN_UNITS_OF_THE_EPISODE]
SINGLE += [{"returns": "gae", "lam": 1.0, "baseline": "value"}]
SINGLE += [{"baseline": "optimal", "optimal_form": form} for form in AXES["optimal_form"]]
SINGLE += [
    {"baseline": name, "leave_one_out": False, "optimal_form": form}
    for name, forms in (("opo", AXES["optimal_form"][:1]), ("optimal", AXES["optimal_form"]))
    for form in forms
]
SINGLE += [{"baseline": "timestep_mean", "leave_one_out": False}]
SINGLE += [{"baseline": "shrinkage", "shrinkage_weight": weight} for weight in (0.0, 0.4)]
SINGLE += [{"truncations": name} for name in ("mask", "drop")]
SINGLE += [{"ratio": name, "dual_clip": 3.0, "importance_cap": 2.0} for name in AXES["ratio"]]
SINGLE += [{"entropy_coef": 0.5, "entropy_form": name} for name in AXES["entropy_form"]]
SINGLE += [{"baseline": "constant", "baseline_constant": -1.3}]
# Combinations of choices, exact or not, for which the declared status must hold.
MIXED = [
    {"baseline": b, "returns": "reward_to_go", "aggregation": a, "beta": 0.3, "ratio": "token"}
    for b in AXES["baseline"]
    for a in ("sequence_sum", "fixed_length")
]
MIXED += [
    {"baseline": b, "returns": "reward_to_go", "optimal_form": form}
    for b in ("optimal", "timestep_mean")
    for form in ("per_timestep", "cumulative")
]
MIXED += [
    {"baseline": b, "beta": 0.3, "kl_placement": "loss", "kl_estimator": "full_path", **more}
    for b in ("none", "rloo", "value", "opo", "group_mean", "batch_mean")
    for more in ({}, {"entropy_coef": 0.4, "entropy_form": "sequence", "ratio": "sequence_product"})
]
MIXED += [
    {"scale": "loo_std", "aggregation": "token_mean"},
    {"scale": "loo_std", "entropy_coef": 0.4, "entropy_form": "sequence"},
    {"zero_spread": "drop", "baseline": "constant"},
    {"zero_spread": "drop", "beta": 0.3},
    {"zero_spread": "drop", "beta": 0.3, "kl_placement": "loss", "kl_estimator": "k2_sequence"},
]
MIXED += [
    {"baseline": "none", "scale": "group_std"},
    {"baseline": "group_mean", "scale": "batch_std", "scale_ddof": 0},
    {"baseline": "constant", "aggregation": "sequence_mean"},
    {"baseline": "none", "aggregation": "token_mean", "returns": "reward_to_go"},
]


def known_scale(e: Estimator, group_size: int, rows: int) -> float:
    if e.zero_spread != "keep" or e.scale == "loo_std":
        return float("nan")
    own_return = {"group_mean": (group_size - 1) / group_size, "batch_mean": (rows - 1) / rows}
    divisor = MAX_LENGTH if e.aggregation == "fixed_length" else 1
    return own_return.get(e.baseline, 1.0) / divisor


def usable(e: Estimator, prompts: int, group_size: int) -> bool:
    if e.scale == "loo_std" and group_size < 3:
        return False
    return e.scale != "other_groups_std" or prompts > 1


def kind_for(fields: dict) -> str:
    """Rewards per step for choices along a row; 0 or 1 for `zero_spread`, so that groups may be equal."""
    if "zero_spread" in fields and fields.get("baseline") != "constant":
        return "binary"
    return "dense" if any(str(name).startswith("episode") for name in fields.values()) else "graded"


def prove(e: Estimator, problem: Problem, group_size: int) -> None:
    """Rows of a group are taken in every order only where there is one prompt: with two it takes long."""
    cut = (LENGTHS == 3) & (IDS[:, 2] != 0)
    unordered = len(problem.logits) > 1
    found = expected_gradient(e, problem, group_size, truncated=cut, unordered=unordered)
    target = problem.target(e.beta, e.entropy_coef)
    scale = known_scale(e, group_size, group_size * len(problem.logits))
    if e.bias_status == "exact":
        assert scale == 1.0
        assert relative_error(found, target) < 1e-10
    elif e.bias_status == "exact_up_to_scale":
        assert relative_error(found, scale * target) < 1e-10
        assert scale != 1.0
    elif e.bias_status == "exact_per_prompt":
        each = [cosine(x, y) for x, y in zip(found, target, strict=True)]
        assert min(each) > 1 - 1e-12
        if len(each) > 1:
            assert cosine(found, target) < 1 - 1e-6
    else:
        assert e.bias_status in ("asymptotic", "biased")
        assert cosine(found, target) < 1 - 1e-4


@pytest.mark.parametrize(("prompts", "group_size"), [(1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, prompts: int, group_size: int) -> None:
    e = Estimator.preset(name)
    assert e.bias_status != "unknown"
    if usable(e, prompts, group_size):
        prove(e, Problem.random(1, prompts=prompts), group_size)


@pytest.mark.parametrize("fields", SINGLE + MIXED, ids=str)
def test_choices(fields: dict) -> None:
    e = Estimator(**fields)
    if usable(e, 1, 3):
        prove(e, Problem.random(2, kind=kind_for(fields)), 3)
    if e.bias_status == "exact_per_prompt" and e.scale != "loo_std":
        prove(e, Problem.random(2, prompts=2), 2)


@pytest.mark.parametrize(
    "fields",
    [f for f in SINGLE if "baseline" in f or ("scale" in f and f["scale"] != "loo_std")]
    + [{"zero_spread": "drop", "baseline": b} for b in ("rloo", "group_mean", "opo", "optimal")],
    ids=str,
)
def test_choices_on_two_prompts(fields: dict) -> None:
    prove(Estimator(**fields), Problem.random(3, prompts=2, kind=kind_for(fields)), 2)


@pytest.mark.parametrize("kind", ["binary", "graded", "dense"])
@pytest.mark.parametrize("seed", range(4, 8))
@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
def test_what_is_exact_is_so_for_any_reward(kind: str, seed: int, returns: str) -> None:
    for baseline in AXES["baseline"]:
        if baseline != "episode_mean":
            e = Estimator(baseline=baseline, returns=returns, beta=0.1)
            assert e.bias_status in ("exact", "exact_up_to_scale")
            prove(e, Problem.random(seed, kind=kind), 2)


def test_the_worst_choice_decides_and_each_gives_its_reason() -> None:
    e = Estimator(baseline="group_mean", aggregation="token_mean")
    assert (e.bias_status, Estimator().bias_status) == ("asymptotic", "exact")
    assert "(G-1)/G" in e.bias_reason and "mean length" in e.bias_reason
    assert Estimator(aggregation="sequence_mean", scale="batch_std").bias_status == "biased"
    ranks = [FROM_BEST_TO_WORST.index(effect.status) for t in CHOICES.values() for effect in t.values()]
    assert min(ranks) == 0
    assert "no choice" in Estimator().bias_reason


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize(("group_size", "prompts"), [(2, 2), (3, 1), (5, 1)])
def test_group_std_ascends_w_of_p_on_binary_rewards(ddof: int, group_size: int, prompts: int) -> None:
    e = Estimator(baseline="group_mean", scale="group_std", scale_ddof=ddof, scale_eps=0.01)
    problem = Problem.random(9, prompts=prompts, kind="binary")
    weights = []
    for theta, rewards in zip(problem.logits, problem.totals, strict=True):
        p = float((probabilities_of(theta) * rewards).sum())
        mean = 0.0
        for k in range(group_size + 1):
            variance = k / group_size * (1 - k / group_size)
            std = (variance * group_size / (group_size - ddof)) ** 0.5
            mean += comb(group_size, k) * p**k * (1 - p) ** (group_size - k) * variance / (std + e.scale_eps)
        weights.append(mean / (p * (1 - p)))
    found = expected_gradient(e, problem, group_size, unordered=group_size > 3)
    wanted = torch.tensor(weights, dtype=torch.double)[:, None] * problem.target()
    assert relative_error(found, wanted) < 1e-10


@pytest.mark.parametrize("baseline", ["rloo", "group_mean", "constant"])
def test_sequence_mean_ascends_reward_per_length(baseline: str) -> None:
    """Each baseline b is held fixed in E[(R - b)/L], and a mean that contains the row shrinks it."""
    problem, group_size = Problem.random(10), 3
    e = Estimator(baseline=baseline, baseline_constant=0.8, aggregation="sequence_mean")

    def per_length(theta, rewards, reference, power=1.0, shift=0.0):
        return (probabilities_of(theta) * (rewards * power - shift) / LENGTHS).sum()

    mean = float((probabilities_of(problem.logits[0]) * problem.totals[0]).sum())
    shift = 0.8 if baseline == "constant" else mean
    wanted = problem.gradient(lambda *a: per_length(*a, shift=shift))
    wanted = wanted * ((group_size - 1) / group_size if baseline == "group_mean" else 1.0)
    assert relative_error(expected_gradient(e, problem, group_size), wanted) < 1e-10
    assert cosine(wanted, problem.target()) < 0.999


@pytest.mark.parametrize(
    "choice",
    [
        {"aggregation": "token_mean"},
        {"scale": "batch_std"},
        pytest.param({"scale": "token_whiten"}, marks=pytest.mark.slow),
        pytest.param({"baseline": "timestep_mean", "leave_one_out": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_asymptotic_choices_approach_the_gradient(choice: dict) -> None:
    problem = Problem.random(2)
    target = problem.target()
    sizes = (3, 4, 5)  # a std over two rows is a special case: it falls only afterwards
    angles = [
        1 - cosine(expected_gradient(Estimator(**choice), problem, n, unordered=True), target) for n in sizes
    ]
    assert angles[0] > angles[1] > angles[2] > 0


def test_asymptotic_choices_have_the_stated_limit() -> None:
    """A step that holds every completion in exact proportion is the limit of large steps."""
    flat = torch.zeros(1, 7, 3, dtype=torch.double)
    problem = Problem(flat, flat, Problem.random(11).rewards)
    probabilities = probabilities_of(flat[0])
    rows = torch.arange(15).repeat_interleave((27 * probabilities).round().long())
    assert len(rows) == 27
    rewards, mask = problem.totals[0, rows], MASK[rows]
    scores = torch.func.jacrev(logprobs_of)(flat[0]).reshape(15, 3, 21)[rows]
    for choice, divisor in (
        ({"aggregation": "token_mean"}, (probabilities * LENGTHS).sum()),
        ({"scale": "batch_std", "scale_ddof": 0, "scale_eps": 0.2}, rewards.std(correction=0) + 0.2),
        (
            {"scale": "token_whiten", "scale_ddof": 0, "scale_eps": 0.2},
            rewards[:, None].expand_as(mask)[mask.bool()].std(correction=0) + 0.2,
        ),
        ({"baseline": "timestep_mean", "leave_one_out": False}, torch.ones(())),
    ):
        e = Estimator(**({"baseline": "batch_mean"} | choice))
        advantages = e.advantages(rewards, mask, group_size=None).policy
        advantages = advantages[:, None].expand_as(mask) if advantages.ndim == 1 else advantages
        weights = e.token_weights(mask, max_length=MAX_LENGTH)
        found = torch.einsum("nt,nt,ntd->d", advantages, weights, scores)
        assert relative_error(found, problem.target()[0] / divisor) < 1e-10


def frozen_prefix(problem: Problem, step_value) -> torch.Tensor:
    """E[sum_t grad of step_value(theta, reference)[prefix]], the prefix drawn from a policy held fixed."""
    theta, reference = problem.logits[0], problem.reference[0]
    chance = probabilities_of(theta)
    return torch.func.grad(lambda x: (chance[:, None] * step_value(x, reference)).sum())(theta).reshape(1, -1)


def step_kl(theta, reference):
    p, q = theta.log_softmax(-1), reference.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[STATES] * MASK


@pytest.mark.parametrize("beta", [0.2, 1.5])
def test_kl_in_the_loss(beta: float) -> None:
    problem = Problem.random(12)
    plain = problem.target()
    wanted = {
        "k1": plain,  # no penalty at all
        "k2": plain - beta * frozen_prefix(problem, step_kl),
        "k3": plain - beta * frozen_prefix(problem, lambda theta, ref: step_kl(ref, theta)),
    }
    for name, gradient in wanted.items():
        e = Estimator(beta=beta, kl_estimator=name, kl_placement="loss")
        assert relative_error(expected_gradient(e, problem, 2), gradient) < 1e-10
        assert relative_error(gradient, problem.target(beta)) > 0.01


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_kl_in_the_reward_lacks_the_estimates_own_gradient(name: str) -> None:
    from tokenrl.core.losses import PER_TOKEN

    problem, beta = Problem.random(13), 0.4
    ref = logprobs_of(problem.reference[0])
    held = PER_TOKEN[name](logprobs_of(problem.logits[0]), ref).sum(-1)
    wanted = problem.gradient(lambda theta, r, _: (probabilities_of(theta) * (r - beta * held)).sum())
    e = Estimator(beta=beta, kl_estimator=name, baseline="rloo")
    assert relative_error(expected_gradient(e, problem, 2), wanted) < 1e-10


def test_values_of_the_kl_estimates() -> None:
    """The mean of k1 and of k3 is the KL of the step, that of k2 is not; k3 is never negative."""
    from tokenrl.core.losses import k1, k2, k3

    problem = Problem.random(14)
    p, q = problem.logits[0].log_softmax(-1), problem.reference[0].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    for f, same in ((k1, True), (k2, False), (k3, True)):
        assert torch.allclose((p.exp() * f(p, q)).sum(-1), kl, rtol=1e-12) == same
    assert (k3(p, q) >= 0).all() and (k1(p, q) < 0).any()


def test_entropy_bonus_is_the_step_entropy_with_the_prefix_held_fixed() -> None:
    problem, coefficient = Problem.random(15), 0.7
    e = Estimator(entropy_coef=coefficient)
    wanted = problem.target() + coefficient * frozen_prefix(problem, lambda theta, _: entropies_of(theta))
    assert relative_error(expected_gradient(e, problem, 2), wanted) < 1e-10
    # grad H(sequence) = that bonus + E[sum_t s_t sum_{u>t} H_u]
    later = entropies_of(problem.logits[0])
    later = later.flip(-1).cumsum(-1).flip(-1) - later
    scores = torch.func.jacrev(logprobs_of)(problem.logits[0]).reshape(15, 3, 21)
    path = torch.einsum("y,yt,ytd->d", probabilities_of(problem.logits[0]), later, scores)[None]
    whole = problem.target(entropy_coef=coefficient)
    assert relative_error(wanted + coefficient * path, whole) < 1e-10


def test_discounted_total_is_exact_for_the_discounted_return() -> None:
    problem, gamma = Problem.random(16, kind="dense"), 0.6
    discounted = (problem.rewards * gamma ** torch.arange(3).double()).sum(-1)
    wanted = Problem(problem.logits, problem.reference, discounted).target()
    found = expected_gradient(Estimator(gamma=gamma), problem, 2)
    assert relative_error(found, wanted) < 1e-10
    to_go = expected_gradient(Estimator(gamma=gamma, returns="reward_to_go"), problem, 2)
    assert cosine(to_go, wanted) < 1 - 1e-4
