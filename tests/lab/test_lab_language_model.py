"""A real transformer of four tokens: exact over all groups, and what the training code does on average."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from drawing import normals, seeded
from listed_policy import problem_of_policy
from tiny_lab_model import PROMPTS, WORDS, points, points_of, tiny_policy

from tokenrl.core import Estimator
from tokenrl.core.memories import RunningMean
from tokenrl.lab.exact.enumeration import exact_moments
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.task import PromptTask
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.learner import make_learner
from tokenrl.language.training.settings import settle
from tokenrl.language.training.step import training_step
from tokenrl.runs.processes import make_accelerator

torch.set_num_threads(1)
GRPO = {
    "baseline": "group_mean",
    "scale": "group_std",
    "aggregation": "sequence_mean",
    "ratio": "token",
}
PATH = {"beta": 0.3, "kl_placement": "loss", "kl_estimator": "closed_form_path"}


@pytest.fixture(scope="module")
def policy() -> Policy:
    policy = tiny_policy(layers=1)
    policy.reference = tiny_policy(seed=1, layers=1).model.requires_grad_(False)
    return policy


@pytest.fixture(scope="module")
def problem(policy: Policy):
    return problem_of_policy(policy, PROMPTS[0], points_of, length=3, vocabulary=4)


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({}, 64),
        (GRPO, 64),
        pytest.param({"beta": 0.3}, 64, marks=pytest.mark.slow),
        (PATH, 64),
        pytest.param({"aggregation": "token_mean"}, 1, marks=pytest.mark.slow),
    ],
    ids=["rloo", "grpo", "kl", "closed-form-path", "token_mean"],
)
def test_training_has_the_exact_mean_and_variance(
    policy: Policy, problem, fields: dict, groups: int
) -> None:
    """Gradients left by `training_step`, sampling included, against the enumerated E[g] and tr Var g.

    A step of n groups of one prompt has the mean of n group gradients, where no axis couples groups. Along
    fixed directions the mean of the steps must lie within 4.5 of its standard errors (false alarm below 1e-4
    a direction, six directions); the mean squared distance from E[g] within 25 % of the exact variance.
    """
    estimator, steps = Estimator(**fields), 40 if groups > 1 else 600
    exact = exact_moments(estimator, problem)
    given = TrainArguments(
        max_steps=1,
        prompts_per_step=groups,
        num_generations=2,
        max_completion_length=3,
        learning_rate=1e-9,
        max_grad_norm=0.0,
        cpu=True,
        estimator=estimator,
    )
    args = settle(given, PromptTask("none", [], []), policy).args
    learner = make_learner(args, policy, make_accelerator(args.cpu))
    learner.optimizer = torch.optim.SGD(policy.trainable_parameters(), lr=0.0)  # the policy stays
    rewards, running = Rewards(points), RunningMean(0.9)
    found = []
    for step in range(1, steps + 1):
        stream = {
            groups: [(step * groups + place, {"prompt": WORDS[0]}) for place in range(groups)]
        }
        training_step(
            learner,
            rewards,
            running,
            step,
            SimpleNamespace(draw_prompts=stream.__getitem__, learn=lambda *_: {}),
        )
        parameters = policy.trainable_parameters()  # a step without a signal leaves no gradient
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found.append(-torch.cat([grad.flatten() for grad in grads]))
        learner.optimizer.zero_grad()
    distance = torch.stack(found) - exact.mean[0]  # [steps, D]
    error = exact.variance / groups
    assert float(distance.square().sum(-1).mean()) == pytest.approx(error, rel=0.25)
    draw = seeded(0)
    directions = [
        exact.mean[0],
        *normals(draw, 5, distance.shape[1]),
    ]
    for u in directions:
        along = distance @ u
        assert abs(float(along.mean())) < 4.5 * float(along.std()) / steps**0.5
