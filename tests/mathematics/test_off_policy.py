"""Importance weights and centred scores, by hand and by summing over everything that a sampler can draw."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace

import pytest
import torch
from drawing import normals, seeded
from refusals import refused
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.core.losses import bounded
from tokenrl.errors import Refused
from tokenrl.lab import (
    Perturbation,
    measure_off_policy,
    named_estimators,
    perturbed_problem,
)
from tokenrl.lab.exact import samplers

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
    "prefix": {"importance": "prefix"},
    "clipped": {"importance": "prefix", "importance_clip": 0.2},
}
POINTS = [e for e in named_estimators().values() if e.fewest_rows <= 3]
EXACT = ("sequence", "centred")
"""What can be exact; every other correction is biased with any estimator."""


@pytest.mark.parametrize(
    ("correction", "estimators"),
    [
        *((name, POINTS[::5] if name in EXACT else POINTS[::16]) for name in CORRECTIONS),
        *(
            pytest.param(name, POINTS if name in EXACT else POINTS[::4], marks=pytest.mark.slow)
            for name in CORRECTIONS
        ),
    ],
)
def test_what_is_declared_off_policy_is_what_is_found(correction: str, estimators: list):
    for point in estimators:
        try:
            verdict = measure_off_policy(replace(point, **CORRECTIONS[correction]))
        except Refused:  # two corrections that exclude each other
            continue
        assert verdict.ok and verdict.declared in (verdict.found, "unknown"), point


def test_the_example_in_the_docstring():
    done = doctest.testmod(samplers)
    assert done.attempted >= 4 and done.failed == 0


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


@pytest.mark.parametrize("drawn_by", ["both", "policy", "sampler"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_centres_are_those_of_the_formula(weights: dict, drawn_by: str):
    """Over the tokens that both can draw; some may be left out by the policy or by the sampler."""
    z, noise = normals(seeded(3), 2, 50, 9)
    other = 2 * z + noise
    ids = torch.arange(9).expand(50, 9)
    if drawn_by != "both":
        ids = z.topk(6).indices
        cut = torch.full_like(z, -torch.inf)
        z, other = (
            x if name == drawn_by else cut.scatter(1, ids, x.gather(1, ids))
            for name, x in (("policy", z), ("sampler", other))
        )
    log_mu = other.log_softmax(-1)
    leaf = z.clone().requires_grad_()
    log_p, mu = leaf.log_softmax(-1).gather(1, ids), log_mu.exp().gather(1, ids)
    ratio = log_p.detach().exp() / mu
    if weights:
        masks = weights.get("importance_bound") == "mask"
        mu = mu * bounded(ratio, Estimator(**weights).importance_range, masks=masks)
    wanted = torch.autograd.grad((mu * log_p).sum(), leaf)[0]
    assert_close(slope_of_centre(weights, z, log_mu), wanted)


REFUSED = [
    ({"importance_cap": 2.0}, "importance_cap is set.*Set importance=token"),
    ({"importance": "token", "importance_clip": 0.5}, "importance_clip.*is 'token'.*'prefix'"),
    ({"importance": "prefix", "importance_centre": True}, "importance 'prefix' weights whole"),
    ({"importance": "token", "importance_bound": "mask"}, "neither is set. Set importance_cap"),
    (
        {"importance": "token", "importance_bound": "mask", "importance_cap": 1 + 1e-9},
        "a bound at 1 .importance_cap.*'truncate'",
    ),
    ({"importance_centre": True, "importance": "sequence"}, "importance 'sequence' weights whole"),
    ({"importance_centre": True, "ratio": "sequence_mean"}, "ratio 'sequence_mean' weights whole"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=str)
def test_corrections_that_make_no_sense_are_refused(fields: dict, words: str):
    with refused(words):
        Estimator(**fields)


def test_a_rule_for_texts_is_refused_where_tokens_write_none():
    with refused("allowed was given as 'a.', but .* give tabular_problem the rows"):
        perturbed_problem(3, Perturbation(allowed="a+"))


def test_the_optimal_baseline_weighs_by_the_squares_of_the_importance_weights():
    """The mean of the other rows, written out."""
    problem = perturbed_problem(3, Perturbation(noise=1.0))
    rows = [0, 4, 7, 11]  # some completions
    logprobs, sampled = problem.logprobs[0, rows], problem.sampler.logprobs[0, rows]
    rewards, norms = problem.totals[0, rows], problem.scores[0, rows].square().sum(-1)
    estimator = Estimator(baseline="optimal", importance="sequence")
    inputs = {"logprobs": logprobs, "sampling_logprobs": sampled, "score_norms": norms}
    found = estimator.advantages(rewards, problem.mask[rows], group_size=4, **inputs).policy
    weights = (logprobs - sampled).sum(-1).exp() ** 2 * norms.sum(-1)
    for i in range(4):
        others = [j for j in range(4) if j != i]
        mean = weights[others] @ rewards[others] / weights[others].sum()
        assert float(found[i]) == pytest.approx(float(rewards[i] - mean))
