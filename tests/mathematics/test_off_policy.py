"""Importance weights and centred scores, by hand and by summing over everything that a sampler can draw."""

from __future__ import annotations

import doctest
import json
import math
import random
from dataclasses import replace
from statistics import median

import pytest
import torch

from tokenrl.cli import main
from tokenrl.core import Estimator
from tokenrl.core.choices import AXES, OBJECTIVES
from tokenrl.core.losses import bounded, importance_weights
from tokenrl.errors import Refused
from tokenrl.lab import (
    Perturbation,
    all_completions,
    measure_bias,
    measure_off_policy,
    off_policy_moments,
    perturbed_problem,
    tabular_problem,
)
from tokenrl.lab.exact import samplers
from tokenrl.lab.exact.report import CORRECTIONS as TABLE, kept_mass

torch.set_num_threads(1)
SAMPLERS = {
    "temperature": lambda z, noise: z / 0.8,
    "both": lambda z, noise: 1.4 * z + noise,
    "top-k": lambda z, noise: z.masked_fill(z == z.min(-1, keepdim=True).values, -1e4),
}


def chosen(logits, every):
    """Log-probability [P, M, T] of each token of each completion."""
    return logits.log_softmax(-1)[:, every.prefix, every.ids] * every.mask


def gradients(fields, sampler, problem, policy, noise):
    """E[g] with pairs of rows of the sampler, and the gradients of J(policy) and J(sampler) in the logits."""
    estimator, every = Estimator(**fields), all_completions(3, 2)
    prompts = torch.arange(len(policy)).repeat_interleave(2)
    z = policy.clone().requires_grad_()
    # Offsets and masks are those at the present logits, held fixed; the temperature is not.
    scale = {"temperature": 1 / 0.8, "both": 1.4}.get(sampler, 1.0)
    mu_logits = scale * z + (SAMPLERS[sampler](z, noise) - scale * z).detach()
    log_pi, log_mu = chosen(z, every), chosen(mu_logits, every)
    sampled = torch.where(log_mu < -1e3, log_pi, log_mu)  # never drawn: any number will do
    vocabulary = z.log_softmax(-1), mu_logits.log_softmax(-1)
    centres = estimator.score_centres(*vocabulary)[:, every.prefix] * every.mask
    rows = torch.cartesian_prod(*[torch.arange(len(every.ids))] * len(prompts))  # [C, N]

    def step_terms(chosen_rows):
        mask, rewards = problem.mask[chosen_rows], problem.rewards[prompts, chosen_rows]
        return estimator.loss_terms(rewards, mask, group_size=2, max_length=4)

    advantages, weights, mask, _ = torch.vmap(step_terms)(rows)
    chance = log_mu.detach()[prompts, rows].sum((-1, -2)).exp()
    terms = (x.flatten(0, 1) for x in (advantages, weights * chance[:, None, None], mask))
    listed = (x[prompts, rows].flatten(0, 1) for x in (log_pi, sampled, centres))
    logprobs, sampling_logprobs, of_rows = listed
    loss = estimator.loss(
        logprobs, *terms, sampling_logprobs=sampling_logprobs.detach(), centres=of_rows
    )
    values = [(x.sum(-1).exp() * problem.totals).sum(-1).mean() for x in (log_pi, log_mu)]
    return [torch.autograd.grad(x, z, retain_graph=True)[0].flatten() for x in (-loss, *values)]


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
    {"baseline": "optimal", "optimal_form": "per_timestep", "returns": "reward_to_go"},
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
    *({"objective": "max_at_k", "objective_order": k} for k in (1, 2)),
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
def test_what_is_declared_off_policy_is_what_is_found(correction: str, estimators: list) -> None:
    for fields in estimators:
        try:
            estimator = Estimator(**fields, **CORRECTIONS[correction])
        except Refused as error:  # a whole-row ratio with centres
            assert "importance_centre" in str(error) and fields["ratio"].startswith("sequence")
            continue
        verdict = measure_off_policy(estimator)
        assert verdict.ok and verdict.declared == verdict.found, fields


def random_estimator(rng: random.Random) -> Estimator | None:
    """Any choice on some axes and any objective, often with an exact correction; None if refused."""
    fields = {axis: rng.choice(names) for axis, names in AXES.items() if rng.random() < 0.25}
    numbers = {
        "beta": 0.3,
        "entropy_coef": 0.2,
        "gamma": 0.8,
        "leave_one_out": False,
        "overlong_buffer": 3,
    }
    numbers |= {"importance_cap": 1.2, "importance_floor": 0.9, "importance_centre": True}
    fields |= {name: number for name, number in numbers.items() if rng.random() < 0.12}
    if rng.random() < 0.5:
        fields |= rng.choice([{"importance_centre": True}, {"importance": "sequence"}])
    if rng.random() < 0.4:
        objective, form = rng.choice(list(OBJECTIVES))
        order = rng.choice((1, 2, 3)) if objective == "max_at_k" else None
        fields |= {"objective": objective, "objective_form": form, "objective_order": order}
    if rng.random() < 0.15:  # three axes that meet too rarely otherwise
        fields |= {"components": "separate", "zero_spread": rng.choice(("drop", "refill"))}
        fields["baseline"] = rng.choice(AXES["baseline"])
    if fields.get("scale") == "other_groups_std" and fields.get("zero_spread") == "refill":
        return None  # better than declared on-policy (exact up to scale), and so off-policy too
    try:
        return Estimator(**fields, window=1)
    except Refused:
        return None


LONG = (1, 80), (2, 300)
EQUAL_REWARDS = [tabular_problem(19, prompts=2, group_size=3, vocabulary=2, rewards="graded")]


def test_the_example_in_the_docstring() -> None:
    done = doctest.testmod(samplers)
    assert done.attempted >= 4 and done.failed == 0


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 24), *(pytest.param(*p, marks=pytest.mark.slow) for p in LONG)]
)
def test_a_random_walk_through_the_axes_finds_no_wrong_declaration(seed: int, count: int) -> None:
    rng, statuses, objectives = random.Random(seed), [], []
    while len(statuses) < count:
        estimator = random_estimator(rng)
        try:
            verdict = measure_off_policy(estimator) if estimator else None
        except Refused:  # needs several prompts in a group, or rewards that no problem has
            continue
        if verdict:
            assert verdict.ok, estimator
            statuses.append(verdict.declared)
            if estimator.objective != "reward" and len(objectives) < count // 12:
                assert measure_bias(estimator).ok, estimator
                objectives.append(estimator.objective)
            if estimator.objective == "reward" and estimator.scale != "other_groups_std":
                on_policy = measure_bias(estimator, EQUAL_REWARDS)
                assert on_policy.ok or on_policy.declared == "biased", estimator
    assert {*objectives} == {"max_at_k", "log_success"}
    assert min(statuses.count(f"exact_for_{side}") for side in ("policy", "sampler")) >= count // 25


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("sampler", ["temperature", "both", "top-k"])
def test_the_lab_agrees_with_autograd_through_the_logits(sampler: str, correction: str) -> None:
    draw = torch.Generator().manual_seed(5)
    policy, noise = torch.randn(2, 2, 3, 3, generator=draw, dtype=torch.double)
    policy = policy[:1].expand(2, -1, -1)
    kinds = {"prompts": 2, "rewards": "graded", "length": 2, "logits": policy[0]}
    problem = tabular_problem(5, **kinds, sampler=lambda z: SAMPLERS[sampler](z, noise))
    moments, beside_sampler = off_policy_moments(Estimator(**CORRECTIONS[correction]), problem)
    mean, of_policy, of_sampler = gradients(
        CORRECTIONS[correction], sampler, problem, policy, noise
    )
    factor = {"temperature": 0.8, "both": 1 / 1.4}.get(sampler, 1.0)
    for matrix, wanted in (
        (moments.mean, mean),
        (moments.target, of_policy),
        (beside_sampler.target, factor * of_sampler),
    ):
        torch.testing.assert_close(matrix.sum(0), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "text", ["temperature=0.8", "noise=1", "top_p=0.9", "top_k=2", "noise=.3,top_p=.8"]
)
def test_centred_scores_are_on_policy_for_the_sampler(text: str) -> None:
    centred = Estimator(importance_centre=True, baseline="constant", baseline_constant=0.5)
    problems = [perturbed_problem(seed, Perturbation.read(text)) for seed in range(20)]
    biases = {
        estimator: [off_policy_moments(estimator, problem)[1].relative_bias for problem in problems]
        for estimator in (centred, Estimator())
    }
    assert max(biases[centred]) < 1e-9 and max(biases[Estimator()]) > 0.02


def test_the_mean_weight_is_the_probability_of_what_the_sampler_keeps() -> None:
    """And weights of sequences ascend E[(R - b) 1(kept)] under the policy, b and what is kept held fixed."""
    for seed in range(5):
        problem = perturbed_problem(seed, Perturbation(top_p=0.7))
        mu, pi = problem.of_sampler.chances, problem.chances
        kept = mu > 0
        weights = (pi / mu).where(kept, 0.0)
        assert (
            float((mu * weights).sum())
            == pytest.approx(kept_mass(problem))
            == float((pi * kept).sum())
        )
        assert kept_mass(problem) < 1
        baseline = (
            mu * problem.totals
        ).sum()  # of RLOO: the mean of the other, which the sampler drew
        gain = pi * kept * (problem.totals - baseline)
        mean = off_policy_moments(Estimator(importance="sequence"), problem)[0].mean[0]
        torch.testing.assert_close(mean, torch.einsum("pm,pmtd->d", gain, problem.scores))


@pytest.mark.slow
def test_the_table_of_corrections(capsys, tmp_path) -> None:
    path = tmp_path / "table.json"
    assert main(["lab", "exact", "--sampler", "temperature=0.8", "--json", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "a sampler with temperature=0.8" in out and "can produce" not in out
    assert "exact_for_sampler" in out and "exact_for_policy" in out
    problems = [perturbed_problem(seed, Perturbation(temperature=0.8)) for seed in range(20)]
    records = json.loads(path.read_text())
    assert [record["correction"] for record in records] == list(TABLE)
    for record in records:
        estimator = Estimator(**TABLE[record["correction"]])
        biases = [off_policy_moments(estimator, problem)[0].relative_bias for problem in problems]
        numbers = [record["policy_bias"], record["worst_policy_bias"]]
        assert numbers == pytest.approx([median(biases), max(biases)], abs=1e-9)
    assert main(["lab", "exact", "--sampler", "top_p=0.9"]) == 0
    assert "No weight brings back the rest" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sampler", "temprature=2"], "Did you mean 'temperature'"),
        (["--sampler", "grpo"], "'grpo' is not a change"),
        (["--sampler", "top_p=2"], "top_p"),
        (["--sampler", "noise=1", "--estimators", "rloo"], "exclude each other"),
    ],
)
def test_samplers_that_cannot_be_used(arguments: list[str], words: str, capsys) -> None:
    assert main(["lab", "exact", *arguments]) != 0
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_kl_in_the_reward_is_that_of_the_policy(beta: float) -> None:
    """With weights of whole sequences the gradient is that of E[R] - beta KL(pi || ref)."""
    problem = perturbed_problem(41, Perturbation(noise=0.5), vocabulary=2, length=2)
    weighted = Estimator(beta=beta, importance="sequence")
    mean = off_policy_moments(weighted, problem)[0].mean
    torch.testing.assert_close(mean, problem.gradient(beta=beta), rtol=1e-10, atol=1e-12)
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
def test_weights_by_hand(fields: dict, weights: list[float], ratio: str) -> None:
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


def weighted(problem, credit):
    """E_mu[sum_t credit_t s_t], of credits [P, M, T]."""
    chances = problem.of_sampler.chances[..., None]
    return torch.einsum("pmt,pmtd->pd", chances * credit, problem.scores) / len(chances)


@pytest.mark.parametrize("kind", ["continuous", "dense"])
def test_a_prefix_weight_corrects_what_comes_before_and_not_what_follows(kind: str) -> None:
    """Rewards that follow are the sampler's; where each has the weight of its own prefix, it is exact."""
    for seed in range(3):
        problem = perturbed_problem(seed, Perturbation(noise=0.3), prompts=2, rewards=kind)
        log_pi, log_mu = problem.logprobs, problem.sampler.logprobs
        until = (log_pi.cumsum(-1) + log_mu.sum(-1, keepdim=True) - log_mu.cumsum(-1)).exp()
        mean = torch.einsum("pmt,pm,pmtd->pd", until * problem.mask, problem.totals, problem.scores)
        prefix = Estimator(importance="prefix", baseline="none")
        single = replace(problem, group_size=1)
        torch.testing.assert_close(off_policy_moments(prefix, single)[0].mean, mean / 2)
        rewards = problem.rewards
        if kind == "continuous":
            last = problem.mask * (problem.mask.sum(-1, keepdim=True) == problem.mask.cumsum(-1))
            rewards = rewards[..., None] * last
        weights = (log_pi - log_mu).cumsum(-1).exp()
        of_each = (weights * rewards).flip(-1).cumsum(-1).flip(-1)
        baseline = 0.7 * weights
        exact = weighted(problem, (of_each - baseline) * problem.mask)
        torch.testing.assert_close(exact, problem.gradient(), rtol=1e-10, atol=1e-12)


def test_centres_of_tokens_that_are_never_sampled_are_finite() -> None:
    """Of the weighted mean score, and of its gradient; a token that neither can draw changes nothing."""
    logits = torch.tensor([0.3, -0.2, -torch.inf], dtype=torch.double).requires_grad_()
    log_mu = torch.tensor([0.25, 0.75, 0.0], dtype=torch.double).log()
    log_pi = logits[:2].log_softmax(-1)
    for fields, weights in (
        ({}, [1.0, 1.0]),
        (
            {"importance": "token", "importance_cap": 1.1},
            (log_pi.exp() / log_mu[:2].exp()).clamp(max=1.1),
        ),
    ):
        centre = Estimator(importance_centre=True, **fields).score_centres(
            logits.log_softmax(-1), log_mu
        )
        wanted = (log_mu[:2].exp() * torch.as_tensor(weights).detach() * log_pi).sum()
        slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (centre, wanted)]
        assert centre.item() == pytest.approx(wanted.item())
        torch.testing.assert_close(slopes[0].nan_to_num()[:2], slopes[1][:2])


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
def test_centres_of_the_top_tokens_are_those_of_the_formula(weights: dict) -> None:
    """And those of all tokens if these are the top, or if all others have one ratio to the policy."""
    draw = torch.Generator().manual_seed(3)
    z, noise = torch.randn(2, 50, 9, generator=draw, dtype=torch.double)
    other = (2 * z + noise).log_softmax(-1)
    whole = slope_of_centre(weights, z, other)
    for top in (9, 12):
        listed = slope_of_centre(weights | {"importance_centre_top": top}, z, other)
        torch.testing.assert_close(listed, whole, rtol=1e-12, atol=1e-14)
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
        torch.testing.assert_close(slope_of_centre(fields, z, other), wanted)
        apart = (slope_of_centre(fields, z, other) - whole).norm() / whole.norm()
        if weights != {"importance": "token"}:  # of which the centre is 0
            assert apart > 1e-3 if top < 8 else apart < 1e-12  # a single other token loses nothing
        raised = (torch.arange(9) < top) * (4 + noise.sort(-1, descending=True).values)
        near = (z.sort(-1, descending=True).values + raised).log_softmax(-1)
        ordered = z.sort(-1, descending=True).values
        torch.testing.assert_close(
            slope_of_centre(fields, ordered, near), slope_of_centre(weights, ordered, near)
        )


def test_top_tokens_beyond_which_nothing_is_drawn_are_all() -> None:
    """In float32 too, where their probabilities add up to 1 but for rounding; also if pi can draw others."""
    z = torch.randn(400, 30, generator=torch.Generator().manual_seed(1))
    cut = z.masked_fill(z < z.topk(6).values[:, -1:], -torch.inf).log_softmax(-1)
    for weights in WEIGHTS:
        fields = weights | {"importance_centre_top": 6}
        listed, whole = slope_of_centre(fields, z, cut), slope_of_centre(weights, z, cut)
        torch.testing.assert_close(listed, whole, rtol=1e-4, atol=1e-6)
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
    ({"importance": "token", "importance_cap": 1.0, "importance_floor": 1.0}, "must be below"),
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
    ({"importance": "token", "importance_cap": 0.9}, "importance_cap"),
    ({"importance": "token", "importance_floor": 1.1}, "importance_floor"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=str)
def test_corrections_that_make_no_sense_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(Refused, match=words):
        Estimator(**fields)


@pytest.mark.parametrize(
    "bound", [{"importance_cap": 1.0001}, {"importance_floor": 0.9999}], ids=str
)
@pytest.mark.parametrize("weights", ["token", "sequence", "geometric"])
def test_rounding_masks_nothing(weights: str, bound: dict) -> None:
    rounding = torch.linspace(-2e-7, 2e-7, 24).reshape(4, 6)
    masked = Estimator(importance=weights, importance_bound="mask", **bound)
    unbounded = importance_weights(rounding, torch.ones(4, 6, dtype=torch.bool), weights)
    assert (bounded(unbounded, masked.importance_range, masks=masked.masks_weights) > 0.999).all()


def test_the_status_of_a_baseline_of_ones_own_is_unknown_where_it_decides() -> None:
    def mine(totals, **_):
        return totals * 0

    statuses = [Estimator(baseline=mine, **x).off_policy_status for x in CORRECTIONS.values()]
    assert statuses == ["biased"] * 3 + ["unknown"] + ["biased"] * 3 + ["unknown"] + ["biased"] * 4
    e = Estimator(baseline="group_mean", importance="sequence")
    assert "cannot produce" in e.off_policy_reason and "(G-1)/G" in e.off_policy_reason
