"""A reason that names an objective is true of the estimator that it is printed for, whatever else that has.

Rewards are dense: with a single reward at the end of a row the whole return and the reward to go are the same.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch

from tokenrl.core import Estimator
from tokenrl.core.choices import CHOICES, OBJECTIVES
from tokenrl.core.effects import ENTROPY, KL_EFFECTS
from tokenrl.errors import Refused
from tokenrl.lab import all_completions, exact_moments
from tokenrl.lab.exact.problems import Problem, tabular_problem

torch.set_num_threads(1)
ONE = tabular_problem(5, group_size=3, vocabulary=2, rewards="dense")
TWO = tabular_problem(6, prompts=2, group_size=2, vocabulary=2, length=2, rewards="dense")
COUNTED = tabular_problem(7, group_size=3, vocabulary=2, rewards="binary")
"""One prompt, two prompts, and rewards of 0 and 1."""

KL = {"beta": 0.3}
CHANGES = [
    *({"baseline": name} for name in CHOICES["baseline"]),
    *({"baseline": name, "leave_one_out": False} for name in ("opo", "optimal", "timestep_mean")),
    {"baseline": "optimal", "optimal_form": "cumulative"},
    {"baseline": "constant", "baseline_constant": 0.4},
    *({"scale": name, "scale_eps": 0.1} for name in CHOICES["scale"] if name != "none"),
    *({"aggregation": name} for name in CHOICES["aggregation"]),
    *({"returns": name} for name in CHOICES["returns"]),
    {"returns": "gae", "lam": 1.0},
    {"gamma": 0.7},
    {"truncations": "mask"},
    {"zero_spread": "drop"},
    {"overlong_buffer": 3},
    {"entropy_coef": 0.3},
    {"baseline": "none", "objective": "max_at_k", "objective_order": 2},
    *(
        {"baseline": "none", "objective": "log_success", "objective_form": form}
        for _, form in [*OBJECTIVES][-3:]
    ),
    *({**KL, "kl_placement": place, "kl_estimator": estimate} for place, estimate in KL_EFFECTS),
]


def combinations():
    """Every change, every two of them, and these with the reward to go; those that are refused are left out."""
    parts = [(), *itertools.combinations(CHANGES, 1), *itertools.combinations(CHANGES, 2)]
    seen = set()
    for chosen, last in itertools.product(parts, ({}, {"returns": "reward_to_go"})):
        every = [*chosen, last]
        names = [name for change in every for name in change]
        if len(names) > len(set(names)):
            continue
        fields = {name: value for change in every for name, value in change.items()}
        try:
            estimator = Estimator(**fields)
        except Refused:
            continue
        if estimator not in seen:
            seen.add(estimator)
            yield fields, estimator


class Rows:
    """The completions of one prompt: probabilities [M], returns [M], lengths [M], scores of rows [M, D].

    Rewards [M, T] include the penalty on long rows.
    """

    def __init__(self, problem: Problem, prompt: int, overlong: int) -> None:
        self.problem, self.size, self.prompt = problem, problem.group_size, prompt
        self.chances, self.rewards = problem.chances[prompt], problem.rewards[prompt].clone()
        self.lengths, self.kept = problem.mask.sum(-1), 1 - problem.truncated.double()
        if overlong:
            beyond = (self.lengths - problem.max_length + overlong) / overlong
            last = (torch.arange(len(self.lengths)), self.lengths.long() - 1)
            last = last if self.rewards.ndim == 2 else last[:1]
            self.rewards[last] -= beyond.clamp(0, 1)
        self.returns = self.rewards.sum(-1) if self.rewards.ndim == 2 else self.rewards
        self.scores = problem.scores[prompt].sum(-2)
        self.norms = self.scores.square().sum(-1)
        self.log_ratios = (problem.logprobs - problem.ref_logprobs)[prompt]
        self.kl_slopes = problem.kl_slopes[prompt].sum(-2)
        self.entropy_slopes = problem.entropy_slopes[prompt].sum(-2)
        self.greedy = self.returns[problem.greedy[prompt]]

    def slope(self, values):
        """The gradient of the mean of values of the rows, which are held fixed."""
        return (self.chances * values) @ self.scores

    def slope_of_group(self, values):
        chosen = torch.cartesian_prod(*[torch.arange(len(self.chances))] * self.size)
        chances = self.chances[chosen].prod(-1) * values(chosen)
        return chances @ self.scores[chosen].sum(1)


def weighted_mean(weights, values):
    return lambda rows: (weights[rows] * values[rows]).sum(-1) / weights[rows].sum(-1)


def own_mean(e, rows):
    """E[R] - E[b]/G, with the mean of the group, weighted by the lengths or by the norms of the scores."""
    weights = {"opo": rows.lengths, "optimal": rows.norms}.get(e.baseline, rows.lengths * 0 + 1)
    mean = rows.slope_of_group(weighted_mean(weights, rows.returns))
    return rows.slope(rows.returns) - mean / rows.size


def subtracted(e, rows):
    """The mean of what is subtracted from a row's return, which does not depend on the row."""
    numbers = {
        "none": 0.0,
        "constant": e.baseline_constant,
        "running_mean": rows.problem.baseline_value,
        "tracker": rows.problem.baseline_value + 0.5 * rows.prompt,
        "remax": rows.greedy,
    }
    return numbers.get(e.baseline, rows.chances @ rows.returns)


def by_length(e, rows):
    return rows.slope((rows.returns - subtracted(e, rows)) / rows.lengths)


def if_whole(e, rows):
    return rows.slope((rows.returns - subtracted(e, rows)) * rows.kept)


def of_reward(e, rows):
    return rows.slope(rows.returns)


def discounted(e, rows):
    steps = e.gamma ** torch.arange(rows.problem.mask.shape[1], dtype=torch.double)
    return rows.slope(rows.rewards @ steps)


def counted_down(e, rows):
    places = torch.arange(1, rows.problem.mask.shape[1] + 1)
    return rows.slope((rows.rewards * (1 - places / rows.lengths[:, None])).sum(-1))


def divided(e, rows):
    """On rewards of 0 and 1, w_G(p) grad p."""
    p, size = float(rows.chances @ rows.returns), rows.size
    weight = 0.0
    for k in range(size + 1):
        variance = k / size * (1 - k / size)
        std = math.sqrt(variance * size / (size - e.scale_ddof))
        weight += math.comb(size, k) * p**k * (1 - p) ** (size - k) * variance / (std + e.scale_eps)
    return weight / (p * (1 - p)) * rows.slope(rows.returns)


NUMBERS = ("none", "constant", "running_mean", "tracker", "remax", "rloo", "group_mean")
"""Baselines whose mean is a number of the prompt alone."""


def one_number(e):
    return e.baseline in NUMBERS


def any_estimator(e):
    return True


ORACLES = {
    "ascends E[R] - E[b]/G": (
        lambda e: e.optimal_form == "sequence",
        own_mean,
        (ONE, TWO),
    ),
    "ascends E[R] - E[b]/N, (N-1)/N": (
        any_estimator,
        of_reward,
        (ONE, TWO),
    ),
    "ascends E[(R - b)/L]": (one_number, by_length, (ONE, TWO)),
    "ascends E[m (R - b)]": (one_number, if_whole, (ONE, TWO)),
    "ascends the discounted return": (any_estimator, discounted, (ONE, TWO)),
    "ascends E[R] - beta E[k2]": (
        any_estimator,
        lambda e, rows: rows.slope(rows.returns - e.beta * rows.log_ratios.square().sum(-1) / 2),
        (ONE, TWO),
    ),
    "J is ascended without any KL": (
        any_estimator,
        of_reward,
        (ONE, TWO),
    ),
    "the gradient of each step's KL": (
        any_estimator,
        lambda e, rows: rows.slope(rows.returns) - e.beta * rows.chances @ rows.kl_slopes,
        (ONE, TWO),
    ),
    "the gradient of each step's entropy": (
        any_estimator,
        lambda e, rows: (
            rows.slope(rows.returns) + e.entropy_coef * rows.chances @ rows.entropy_slopes
        ),
        (ONE, TWO),
    ),
    "with binary rewards and the baseline 'group_mean'": (
        lambda e: e.baseline in ("rloo", "group_mean") and not e.overlong_buffer,
        divided,
        (COUNTED,),
    ),
    "with the undiscounted reward to go, it ascends": (
        lambda e: e == Estimator(baseline="episode_mean", returns="reward_to_go"),
        counted_down,
        (ONE, TWO),
    ),
    "E[1/(std + eps)] of": (any_estimator, of_reward, (ONE, TWO)),
    "of B prompts each is weighted by": (
        any_estimator,
        of_reward,
        (ONE,),
    ),
}
"""By words of a reason: for which estimators it claims something, the gradient that it names, and where."""
ELSEWHERE = (
    "the gradient tends to that of J",  # whose limit `tends_to_the_gradient` takes
    "(n-1)/n, with n rows that still act",
    "new prompts fill the step",
    "the gradient of each step's FORWARD KL",  # tests/mathematics/test_expectations.py
    "the gradient of no objective",
    "in sum a good episode",
    "unbiased if they are exact",  # test_values_of_gae_may_be_wrong_by_what_no_action_changes
    "with three or more reward levels",  # tests/mathematics/test_objectives.py
    "E[1/b; b > 0]",
    "as the group grows, it tends to ascend the mean of the best share",
    "under the square of the policy",  # tests/mathematics/test_target_policies.py
    "ascends sum_x U(p(x))",  # tests/language/training/test_prompt_weights.py
)


def test_every_objective_that_a_reason_names_has_its_gradient_here():
    effects = [choice for names in CHOICES.values() for choice in names.values()]
    effects += [e for c in effects for e in (c.row_inside, c.discounted) if e is not None]
    effects += [*KL_EFFECTS.values(), ENTROPY, *OBJECTIVES.values()]
    named = [e.reason for e in effects if ": " in e.reason and e.status != "exact"]
    assert len(named) >= 18
    for reason in named:
        assert any(words in reason for words in (*ORACLES, *ELSEWHERE)), reason


def test_what_a_reason_names_is_ascended():
    used = dict.fromkeys(ORACLES, 0)
    wrong = []
    for fields, estimator in combinations():
        reason = estimator.bias_reason
        for words, (applies, gradient, problems) in ORACLES.items():
            if words not in reason or not applies(estimator):
                continue
            for problem in problems:
                try:
                    mean = exact_moments(estimator, problem).mean
                except Refused:
                    continue
                used[words] += 1
                for prompt, own in enumerate(mean):
                    target = gradient(estimator, Rows(problem, prompt, estimator.overlong_buffer))
                    cosine = torch.nn.functional.cosine_similarity(own, target, dim=0)
                    if not cosine > 1 - 1e-9:
                        wrong.append((words, fields, float(cosine)))
    assert wrong == []
    assert min(used.values()) > 0, used


def test_values_of_gae_may_be_wrong_by_what_no_action_changes():
    """A number for each step: it cancels where all rows have one length, and not where an action can end them."""
    gae = Estimator(baseline="value", returns="gae", lam=0.5)
    for ends, status in (((), "exact"), ((0,), "biased")):
        rows = all_completions(2, 3, ends=ends)
        problem = tabular_problem(5, vocabulary=2, rewards="dense", true_values=True, rows=rows)
        wrong = problem.values + torch.arange(3) * problem.mask
        assert exact_moments(gae, replace(problem, values=wrong)).status == status
