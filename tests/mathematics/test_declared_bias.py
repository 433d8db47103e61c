"""Every declaration holds, a wrong one is detected, and the lab gives the same result twice."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
import torch
from refusals import refused

import tokenrl.lab.exact.verdict as verdict_module
from tokenrl.cli import main
from tokenrl.core import Estimator
from tokenrl.core.choices import CHOICES
from tokenrl.core.effects import FROM_BEST_TO_WORST
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused
from tokenrl.lab import measure_bias, named_estimators, problem_of_mdp, random_mdp
from tokenrl.lab.exact.problems import tabular_problem
from tokenrl.lab.exact.verdict import Verdict

torch.set_num_threads(1)
POINTS = named_estimators()
SMALL = (
    tabular_problem(2, prompts=1, group_size=3, rewards="continuous", vocabulary=2),
    tabular_problem(3, prompts=2, group_size=3, vocabulary=2, rewards="graded", length=2),
    tabular_problem(5, prompts=1, group_size=2, rewards="dense"),
    problem_of_mdp(random_mdp(2), steps=2, beyond=2, group_size=2, critic="true"),
    tabular_problem(19, prompts=2, group_size=3, vocabulary=2, rewards="graded"),
)
"""Problems on which a whole axis is measured in a second, and which show every bias."""
LEVELS = (
    tabular_problem(18, prompts=1, group_size=5, vocabulary=2, rewards="graded"),
    tabular_problem(14, prompts=2, group_size=4, vocabulary=2, rewards="graded", length=2),
)
"""The same for other objectives: larger groups, and no negative reward."""


@pytest.mark.parametrize("name", POINTS)
def test_what_is_declared_is_what_is_found(name: str):
    """For every preset, every choice on every axis and every KL: neither too good nor too bad."""
    verdict = measure_bias(POINTS[name], SMALL if POINTS[name].objective == "reward" else LEVELS)
    assert verdict.ok and verdict.found == verdict.declared
    if verdict.declared == "exact":
        assert verdict.relative_bias < 1e-10
    if verdict.declared == "exact_up_to_scale":
        assert verdict.cosine > 1 - 1e-10 and verdict.relative_bias > 0.01
    if verdict.declared == "biased":
        assert verdict.cosine < 1 - 1e-5


LOO_STD = {"scale": "loo_std", "scale_eps": 0.1}


def mine(totals, **_):
    return totals * 0


LOSS_KL = {"beta": 0.3, "kl_placement": "loss", "kl_estimator": "full_path"}
BEST_OF_2 = {"baseline": "none", "objective": "max_at_k", "objective_order": 2}
SUCCESS = {"baseline": "none", "objective": "log_success"}
LOO_SUCCESS = {**SUCCESS, "objective_form": "leave_one_out"}
EXACT = "no choice"
OF_THEIR_OWN = "of their own"
COMBINED = [
    ({"baseline": mine}, "unknown", "of your own"),
    ({"baseline": mine, "aggregation": "sequence_mean"}, "unknown", "1/length"),
    ({"ratio": "token", "importance": "token", "importance_cap": 2.0}, "exact", EXACT),
    ({"baseline": "opo", "ratio": "sequence_product", **LOSS_KL}, "exact", EXACT),
    ({"returns": "reward_to_go", "gamma": 0.7}, "biased", "the gradient of no objective"),
    ({"scale": "group_std"}, "biased", "on rewards of 0 and 1 it is exact_per_prompt"),
    ({**LOO_STD, "aggregation": "token_mean"}, "biased", "in the limit only"),
    ({**LOO_STD, "entropy_coef": 0.4}, "biased", "coefficient"),
    ({"scale": "batch_std", "scale_ddof": 0, "baseline": "group_mean"}, "asymptotic", "(G-1)/G"),
    ({"baseline": "none", "truncations": "mask"}, "biased", "ascends E[m (R - b)]"),
    ({**LOSS_KL, "baseline": "group_mean"}, "biased", "changes its coefficient"),
    ({**LOSS_KL, "baseline": "batch_mean"}, "asymptotic", "(N-1)/N as"),
    ({"zero_spread": "refill", **LOO_STD}, "exact_per_prompt", "kept"),
    ({"zero_spread": "drop", "returns": "reward_to_go"}, "unknown", "before the last action"),
    ({"zero_spread": "drop", "baseline": "shrinkage"}, "biased", OF_THEIR_OWN),
    ({"zero_spread": "drop", "overlong_buffer": 3}, "biased", OF_THEIR_OWN),
    ({**BEST_OF_2, "zero_spread": "drop"}, "exact_per_prompt", "kept groups"),
    ({**BEST_OF_2, "zero_spread": "refill"}, "exact_up_to_scale", "cancels"),
    ({**BEST_OF_2, "objective_form": "sloo", "zero_spread": "drop"}, "biased", OF_THEIR_OWN),
    (
        {**BEST_OF_2, "objective_form": "sloo", "aggregation": "fixed_length"},
        "exact_up_to_scale",
        "1/max_length",
    ),
    ({**LOO_SUCCESS, **LOSS_KL}, "biased", "coefficient"),
    ({**LOO_SUCCESS, "aggregation": "token_mean"}, "biased", "in the limit only"),
]
"""What depends on several fields: their status, and words of the reason."""


@pytest.mark.parametrize(("fields", "status", "words"), COMBINED)
def test_combinations_hold_what_they_declare(fields: dict, status: str, words: str):
    estimator = Estimator(**fields)
    assert (estimator.bias_status, words in estimator.bias_reason) == (status, True)
    verdict = measure_bias(estimator, SMALL if "objective" not in fields else LEVELS)
    off = status == "biased" and verdict.cosine < 1 - 1e-5
    assert verdict.ok or off, (verdict.found, verdict.cosine)


ACROSS_THE_STEP = [
    {axis: name, **({"leave_one_out": False} if choice.row_inside else {})}
    for axis in ("baseline", "scale", "aggregation")
    for name, choice in CHOICES[axis].items()
    if choice.compares == "step" or choice.status == "asymptotic"
]
"""Choices that compare rows of several prompts, or divide by all of them."""


@pytest.mark.parametrize("prompts", ["weighted", "inverse"])
@pytest.mark.parametrize("fields", ACROSS_THE_STEP, ids=lambda fields: next(iter(fields.values())))
def test_prompts_that_are_drawn_unequally_beside_what_goes_across_the_step(fields, prompts):
    """Where the rest is right in the limit only, weights that stay leave another direction."""
    verdict = measure_bias(Estimator(prompts=prompts, **fields), SMALL)
    assert verdict.ok and verdict.found == verdict.declared
    if prompts == "inverse":
        assert verdict.declared == Estimator(**fields).bias_status


def test_every_preset_and_every_choice_is_a_point():
    assert len(POINTS) >= 25 and len(set(POINTS.values())) == len(POINTS)
    assert {Estimator.preset(name) for name in PRESETS} <= set(POINTS.values())
    for axis, names in CHOICES.items():
        assert {getattr(e, axis) for e in POINTS.values()} >= set(names)


def test_ok_is_as_good_as_declared_and_a_bias_must_be_found():
    for place, declared in enumerate(FROM_BEST_TO_WORST):
        good = {found for found in FROM_BEST_TO_WORST[:-1] if Verdict(declared, found, ()).ok}
        assert good == (
            {"biased"} if declared == "biased" else {*FROM_BEST_TO_WORST[: place + 1]} - {"unknown"}
        )


def test_the_example_in_the_docstring():
    done = doctest.testmod(verdict_module)
    assert done.attempted >= 5 and done.failed == 0


def test_problems_that_cannot_be_used():
    for nothing in ([], [tabular_problem(1, group_size=1)]):
        with pytest.raises(Refused):
            measure_bias(Estimator(), nothing)


WRONG = [
    (
        {"scale group_std": "exact", "aggregation sequence_mean": "exact"},
        Estimator.preset("grpo"),
        "biased",
    ),
    (
        {"aggregation sequence_mean": "asymptotic"},
        Estimator(aggregation="sequence_mean"),
        "biased",
    ),
    ({"baseline group_mean": "exact"}, Estimator(baseline="group_mean"), "exact_up_to_scale"),
    ({"scale batch_std": "exact_per_prompt"}, Estimator(scale="batch_std"), "asymptotic"),
    ({"baseline rloo": "biased"}, Estimator(), "exact"),  # needlessly
]


@pytest.mark.parametrize(("changes", "estimator", "found"), WRONG, ids=lambda x: str(x)[:30])
def test_a_wrong_declaration_is_caught(
    monkeypatch, changes: dict, estimator: Estimator, found: str
) -> None:
    for choice, status in changes.items():
        axis, name = choice.split()
        monkeypatch.setitem(CHOICES[axis], name, replace(CHOICES[axis][name], status=status))
    verdict = measure_bias(replace(estimator), SMALL)  # made anew, with the changed entries
    assert verdict.declared != found == verdict.found and not verdict.ok


def of_groups(values, group_size):
    return values.reshape(-1, group_size)


@pytest.mark.parametrize(
    ("declaration", "ok"),
    [(("exact", "of the others"), False), (("biased", "the row is in it"), True)],
)
def test_what_a_baseline_declares_of_itself_is_checked_as_ours_is(
    declaration, ok, workplace
) -> None:
    source = "def largest(totals, *, group_size, **_):\n    groups = totals.view(-1, group_size)\n"
    source += "    return groups.amax(-1).repeat_interleave(group_size)\n\n\n"
    (workplace / "own.py").write_text(f"{source}largest.bias = {declaration}\n")
    estimator = Estimator(baseline="own.py:largest")
    verdict = measure_bias(estimator, SMALL)
    assert (verdict.declared, verdict.found, verdict.ok) == (declaration[0], "biased", ok)
    assert (declaration[1] in estimator.bias_reason) == (declaration[0] == "biased")
    assert main(["lab", "exact", "--estimators", "own.py:largest"]) == 1 - ok


@pytest.mark.parametrize("declaration", ["exact", ("right", "because"), ("exact", 3)])
def test_a_declaration_that_is_no_status_with_a_reason_is_refused(declaration):
    def own(totals, **_):
        return 0 * totals

    own.bias = declaration
    with refused("it must be a status and the reason, two texts"):
        _ = Estimator(baseline=own).bias_status


def of_others(totals, group_size):
    groups = of_groups(totals, group_size)
    return ((groups.sum(1, keepdim=True) - groups) / (group_size - 1)).flatten()


def longer(tokens):
    def bonus(totals, *, group_size, mask, **_):
        return of_others(totals, group_size) + 0.3 * (mask.sum(-1) - tokens).clamp(min=0)

    return bonus


def median_from(size):
    def median(totals, *, group_size, **_):
        middle = of_groups(totals, group_size).median(1).values.repeat_interleave(group_size)
        return middle if group_size >= size else of_others(totals, group_size)

    return median


def own_if_long(totals, *, group_size, mask, **_):
    return torch.where(mask.sum(-1) >= 3, 0.5 * totals, of_others(totals, group_size))


PERMANENT = {"longer": longer(2), "median": median_from(4), "own": own_if_long}


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [(name, "token_mean") for name in PERMANENT]
    + [
        pytest.param(name, "sequence_sum", marks=[pytest.mark.slow] * (name != "own"))
        for name in PERMANENT
    ],
)
def test_a_permanent_bias_that_only_some_problems_show_is_not_called_asymptotic(
    name, aggregation
) -> None:
    """The mean over tokens has a bias that vanishes, which must not hide the one that stays."""
    assert (
        measure_bias(Estimator(baseline=PERMANENT[name], aggregation=aggregation)).found == "biased"
    )


def of_many_prompts(totals, *, group_size, **_):
    own = 0.1 * totals.square() * (len(totals) > 3 * group_size)
    return of_others(totals, group_size) + own


def of_large_rewards(totals, *, group_size, **_):
    return of_others(totals, group_size) + 0.3 * totals.clamp(min=5)


BEYOND = (median_from(5), longer(3), of_many_prompts, of_large_rewards)


@pytest.mark.parametrize(
    "baseline", [BEYOND[0], *(pytest.param(x, marks=pytest.mark.slow) for x in BEYOND[1:])]
)
def test_measures_go_beyond_the_main_problems(baseline):
    """Larger groups, longer completions, more prompts and larger rewards than the main problems have."""
    verdict = measure_bias(Estimator(baseline=baseline))
    assert verdict.found == "biased" and verdict.measurements[-1].relative_bias > 1e-3


TRIED = "prompts 1 to 4, group size 2 to 8, tokens 1 to 6, rewards -5.4 to 14"


@pytest.mark.parametrize(
    "baseline",
    [median_from(9), longer(6)],
    ids=lambda f: f.__name__,
)
def test_beyond_what_was_tried_a_bias_is_not_found_and_the_line_says_how_far_that_is(
    baseline,
) -> None:
    verdict = measure_bias(Estimator(baseline=baseline))
    assert verdict.found == "exact" and verdict.tried == TRIED
    assert repr(verdict).startswith(f"{baseline.__name__}: exact, cosine 1.000, noise ")
    assert repr(verdict).endswith(f"; tried: {TRIED}")


class Average:
    value = 0.0

    def __call__(self, totals, **_):
        before, self.value = self.value, 0.9 * self.value + 0.1 * totals.mean()
        return totals * 0 + before


def branching(totals, **_):
    return totals * 0 + totals.max().item()


def undefined(totals, *, group_size, **_):
    spread = of_groups(totals, group_size).std(1).repeat_interleave(group_size)
    return of_others(totals, group_size) * spread / spread  # 0 / 0 in a group of equal rewards


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (branching, r"'branching' cannot .* without \.item\(\)"),
        (Average(), r"'Average' returned two different results .* has a memory"),
        (undefined, r"returned nan or inf on the problem '1 prompts, .*': correct it"),
    ],
)
def test_a_baseline_that_cannot_be_enumerated_is_refused(baseline, words: str):
    with refused(words):
        measure_bias(Estimator(baseline=baseline), SMALL)
