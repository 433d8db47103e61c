"""Importance weights and centred scores, by hand and by summing over everything that a sampler can draw."""

from __future__ import annotations

import doctest
import math
from statistics import median

import pytest
import torch
from command_line import completes
from drawing import normals, seeded
from folders import read_json
from refusals import refused
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.core.losses import bounded
from tokenrl.errors import Refused
from tokenrl.lab import (
    Perturbation,
    exact_moments,
    measure_off_policy,
    off_policy_moments,
    perturbed_problem,
)
from tokenrl.lab.exact import samplers
from tokenrl.lab.exact.report import CORRECTIONS as TABLE

torch.set_num_threads(1)


CORRECTIONS = {
    "none": {},
    "token": {"importance": "token"},
    "geometric": {"importance": "geometric"},
    "sequence": {"importance": "sequence"},
    "truncated": {"importance": "sequence", "importance_cap": 1.2},
    "floored": {"importance": "sequence", "importance_floor": 0.9},
    "masked": {"importance": "sequence", "importance_cap": 1.2, "importance_bound": "mask"},
    "centred": {"importance_centre": True},
    "token, centred": {"importance": "token", "importance_cap": 1.2, "importance_centre": True},
    "centred, top 1": {"importance_centre": True, "importance_centre_top": 1},
    "prefix": {"importance": "prefix"},
    "clipped": {"importance": "prefix", "importance_clip": 0.2},
}
KL = {"beta": 0.3}
ESTIMATORS = [
    *({"baseline": name} for name in ("none", "constant", "running_mean", "rloo", "group_mean")),
    *(
        {"baseline": name}
        for name in ("batch_mean", "remax", "opo", "optimal", "shrinkage", "value")
    ),
    {"baseline": "timestep_mean"},
    {"baseline": "opo", "leave_one_out": False},
    {"baseline": "value", "returns": "reward_to_go"},
    {"baseline": "timestep_mean", "returns": "reward_to_go"},
    {"baseline": "optimal", "optimal_form": "cumulative", "returns": "reward_to_go"},
    {"baseline": "value", "returns": "gae", "lam": 1.0},
    {"returns": "gae"},
    {"gamma": 0.7},
    *({"scale": name} for name in ("group_std", "loo_std", "batch_std", "token_whiten")),
    *({"aggregation": name} for name in ("fixed_length", "token_mean", "sequence_mean")),
    *({"ratio": name} for name in ("token", "cispo", "sequence_mean", "sequence_product")),
    {"truncations": "mask"},
    *({"zero_spread": name} for name in ("drop", "refill")),
    KL | {"kl_estimator": "k3"},
    KL | {"kl_placement": "loss", "kl_estimator": "full_path"},
    {"entropy_coef": 0.3},
    *({"baseline": "none", "objective": "max_at_k", "objective_order": k} for k in (1, 2)),
]


EXACT = ("sequence", "centred")
"""What can be exact; every other correction is biased with any estimator."""


@pytest.mark.parametrize(
    ("correction", "estimators"),
    [
        *((name, ESTIMATORS if name in EXACT else ESTIMATORS[3::8]) for name in CORRECTIONS),
        *(pytest.param(name, ESTIMATORS, marks=pytest.mark.slow) for name in CORRECTIONS),
    ],
)
def test_what_is_declared_off_policy_is_what_is_found(correction: str, estimators: list):
    for fields in estimators:
        try:
            estimator = Estimator(**fields, **CORRECTIONS[correction])
        except Refused as error:  # a whole-row ratio with centres
            assert "importance_centre" in str(error) and fields["ratio"].startswith("sequence")
            continue
        verdict = measure_off_policy(estimator)
        assert verdict.ok and verdict.declared == verdict.found, fields


def test_the_example_in_the_docstring():
    done = doctest.testmod(samplers)
    assert done.attempted >= 4 and done.failed == 0


@pytest.mark.slow
def test_the_table_of_corrections(said, tmp_path):
    path = tmp_path / "table.json"
    completes("lab exact --sampler temperature=0.8 --json", str(path))
    out = said()
    assert "a sampler with temperature=0.8" in out
    assert "exact_for_sampler" in out and "exact_for_policy" in out
    records = read_json(path)
    assert [record["correction"] for record in records] == list(TABLE)
    problems = [perturbed_problem(seed, Perturbation(temperature=0.8)) for seed in range(20)]
    last = Estimator.preset(TABLE[records[-1]["correction"]])
    biases = [off_policy_moments(last, problem)[0].relative_bias for problem in problems]
    numbers = [records[-1]["policy_bias"], records[-1]["worst_policy_bias"]]
    assert numbers == pytest.approx([median(biases), max(biases)], abs=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_kl_in_the_reward_is_that_of_the_policy(beta: float):
    """With weights of whole sequences the gradient is that of E[R] - beta KL(pi || ref)."""
    problem = perturbed_problem(41, Perturbation(noise=0.5), vocabulary=2, length=2)
    weighted = Estimator(beta=beta, importance="sequence")
    mean = off_policy_moments(weighted, problem)[0].mean
    assert_close(mean, problem.gradient(beta=beta), rtol=1e-10, atol=1e-12)
    assert weighted.off_policy_status == "exact_for_policy"
    status = "biased" if beta else "exact_for_sampler"
    assert Estimator(beta=beta, importance_centre=True).off_policy_status == status


BY_HAND = [
    ({"importance": "token"}, [2.0, 0.25]),
    ({"importance": "sequence"}, [0.5, 0.5]),
    ({"importance": "geometric"}, [0.5**0.5] * 2),
    ({"importance": "prefix"}, [2.0, 0.5]),
    ({"importance": "prefix", "importance_clip": 0.5}, [math.exp(0.5), 0.5]),
    ({"importance": "prefix", "importance_clip": 0.4}, [math.exp(0.4), math.exp(-0.4 * 2**0.5)]),
    ({"importance": "prefix", "importance_cap": 1.5}, [1.5, 0.5]),
    ({"importance": "token", "importance_cap": 1.5}, [1.5, 0.25]),
    ({"importance": "token", "importance_cap": 1.5, "importance_floor": 0.5}, [1.5, 0.5]),
    ({"importance": "token", "importance_cap": 1.5, "importance_bound": "mask"}, [0.0, 0.25]),
    ({"importance": "token", "importance_floor": 0.5, "importance_bound": "mask"}, [2.0, 0.0]),
    ({"importance": "sequence", "importance_floor": 0.75}, [0.75, 0.75]),
    ({"importance": "sequence", "importance_floor": 0.75, "importance_bound": "mask"}, [0.0, 0.0]),
]


@pytest.mark.parametrize("ratio", ["none", "token"])
@pytest.mark.parametrize(("fields", "weights"), BY_HAND, ids=str)
def test_weights_by_hand(fields: dict, weights: list[float], ratio: str):
    """A row of two actions with ratios 2 and 1/4, and a position that is no action and holds anything."""
    logprobs = torch.full((1, 3), -1.0, dtype=torch.double).requires_grad_()
    gap = torch.tensor([[math.log(2), math.log(0.25), math.nan]], dtype=torch.double)
    mask = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.double)
    old = logprobs.detach()
    inputs = {"old_logprobs": old, "sampling_logprobs": old - gap, "ref_logprobs": old}
    e = Estimator(baseline="none", ratio=ratio, beta=0.1, kl_placement="loss", **fields)
    loss = e.loss(logprobs, torch.tensor([3.0]), mask, mask, **inputs)
    slope = torch.autograd.grad(loss, logprobs)[0][0].tolist()
    # the KL is not weighed
    assert slope == pytest.approx([0.1 - 3 * weights[0], 0.1 - 3 * weights[1], 0.0])


WEIGHTS = [
    {},
    {"importance": "token"},
    {"importance": "token", "importance_cap": 1.2, "importance_floor": 0.8},
    {"importance": "token", "importance_cap": 1.2, "importance_bound": "mask"},
]


def slope_of_centre(fields: dict, z: torch.Tensor, log_mu: torch.Tensor) -> torch.Tensor:
    """The gradient of the centres in the logits of the policy."""
    leaf = z.clone().requires_grad_()
    centres = Estimator(importance_centre=True, **fields).score_centres(
        leaf.log_softmax(-1), log_mu
    )
    return torch.autograd.grad(centres.sum(), leaf)[0]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_centres_of_the_top_tokens_are_those_of_the_formula(weights: dict):
    """And those of all tokens if these are the top, or if all others have one ratio to the policy."""
    draw = seeded(3)
    z, noise = normals(draw, 2, 50, 9)
    other = (2 * z + noise).log_softmax(-1)
    whole = slope_of_centre(weights, z, other)
    for top in (9, 12):
        listed = slope_of_centre(weights | {"importance_centre_top": top}, z, other)
        assert_close(listed, whole, rtol=1e-12, atol=1e-14)
    bounds = Estimator(**weights).importance_range
    masks = weights.get("importance_bound") == "mask"
    for top in (1, 3, 8):
        fields = weights | {"importance_centre_top": top}
        leaf = z.clone().requires_grad_()
        ids = other.argsort(-1, descending=True)[:, :top]
        log_p = leaf.log_softmax(-1).gather(1, ids)
        p, q = log_p.detach().exp(), other.exp().gather(1, ids)
        alpha = (1 - q.sum(1)) / (1 - p.sum(1))

        def f(ratio: torch.Tensor) -> torch.Tensor:
            return bounded(ratio, bounds, masks=masks) if weights else torch.ones_like(ratio)

        centre = (q * f(p / q) - (alpha * f(1 / alpha))[:, None] * p) * log_p
        wanted = torch.autograd.grad(centre.sum(), leaf)[0]
        assert_close(slope_of_centre(fields, z, other), wanted)
        apart = (slope_of_centre(fields, z, other) - whole).norm() / whole.norm()
        if weights != {"importance": "token"}:  # of which the centre is 0
            assert apart > 1e-3 if top < 8 else apart < 1e-12  # a single other token loses nothing
        raised = (torch.arange(9) < top) * (4 + noise.sort(-1, descending=True).values)
        near = (z.sort(-1, descending=True).values + raised).log_softmax(-1)
        ordered = z.sort(-1, descending=True).values
        assert_close(
            slope_of_centre(fields, ordered, near), slope_of_centre(weights, ordered, near)
        )


def test_top_tokens_beyond_which_nothing_is_drawn_are_all():
    """In float32 too, where their probabilities add up to 1 but for rounding; also if pi can draw others."""
    z = torch.randn(400, 30, generator=seeded(1))
    cut = z.masked_fill(z < z.topk(6).values[:, -1:], -torch.inf).log_softmax(-1)
    for weights in WEIGHTS:
        fields = weights | {"importance_centre_top": 6}
        listed, whole = slope_of_centre(fields, z, cut), slope_of_centre(weights, z, cut)
        assert_close(listed, whole, rtol=1e-4, atol=1e-6)
    listed = slope_of_centre(fields, cut, z.log_softmax(-1))  # others that only the sampler draws
    assert listed.isfinite().all()


REFUSED = [
    ({"importance_cap": 2.0}, "importance_cap is set.*Set importance=token"),
    ({"importance_floor": 0.5}, "importance_floor is set.*Set importance=token"),
    ({"importance_bound": "mask"}, "importance_bound is set.*Set importance=token"),
    ({"importance": "token", "importance_clip": 0.5}, "importance_clip.*is 'token'.*'prefix'"),
    ({"importance_centre_top": 8}, "importance_centre_top.*importance_centre is False"),
    ({"importance": "prefix", "importance_centre": True}, "importance 'prefix' weights whole"),
    ({"importance": "token", "importance_bound": "mask"}, "neither is set. Set importance_cap"),
    *(
        (
            {"importance": weights, "importance_bound": "mask", name: bound},
            f"a bound at 1 .{name}.*'truncate'",
        )
        for weights in ("token", "sequence", "geometric")
        for name, bound in (
            ("importance_cap", 1.0),
            ("importance_cap", 1 + 1e-9),
            ("importance_floor", 1.0),
        )
    ),
    ({"importance_centre": True, "importance": "sequence"}, "importance 'sequence' weights whole"),
    ({"importance_centre": True, "ratio": "sequence_mean"}, "ratio 'sequence_mean' weights whole"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=str)
def test_corrections_that_make_no_sense_are_refused(fields: dict, words: str):
    with refused(words):
        Estimator(**fields)


@pytest.mark.parametrize("importance", ["none", "sequence"])
def test_the_optimal_baseline_weighs_by_the_squares_of_the_importance_weights(importance):
    """Least noise of a constant baseline, found on a line, and the mean of the other rows by hand."""
    problem = perturbed_problem(3, Perturbation(noise=1.0))
    chances = problem.of_sampler.chances[0]
    weights = torch.ones_like(chances)
    if importance == "sequence":
        weights = problem.chances[0] / chances
    rewards, norms = problem.totals[0], problem.scores.sum(-2)[0].square().sum(-1)
    best = float((chances * weights**2 * norms) @ rewards / ((chances * weights**2) @ norms))

    def second_moment(constant):
        estimator = Estimator(
            baseline="constant", baseline_constant=constant, importance=importance
        )
        return exact_moments(estimator, problem, group_size=1).second

    moments = [second_moment(best + shift) for shift in (-0.1, -1e-3, 0.0, 1e-3, 0.1)]
    assert moments[2] == min(moments)
    rows = torch.tensor([0, 4, 7, 11])  # some completions
    of_tokens = problem.scores[0, rows].square().sum(-1)
    estimator = Estimator(baseline="optimal", importance=importance)
    advantages = estimator.advantages(
        rewards[rows],
        problem.mask[rows],
        group_size=4,
        logprobs=problem.logprobs[0, rows],
        sampling_logprobs=problem.sampler.logprobs[0, rows],
        score_norms=of_tokens,
    ).policy
    squares = weights[rows] ** 2 * of_tokens.sum(-1)
    for i in range(4):
        others = [j for j in range(4) if j != i]
        mean = squares[others] @ rewards[rows][others] / squares[others].sum()
        assert float(advantages[i]) == pytest.approx(float(rewards[rows][i] - mean))
