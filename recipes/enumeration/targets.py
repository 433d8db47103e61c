"""Which objective does TPO ascend, what do four passes win, and is eta a temperature? By enumeration in float64.

    python recipes/enumeration/targets.py

A policy chooses between three answers of one token, and all groups of completions are listed. `direction` has cosines
of the expected step with the gradient of the mean reward, with that of what TPO ascends as the group grows, and with
those of its limits for a large and for a small eta. A step with a cosine below 0 lowers the mean reward. `passes` has
what the updates with one group change in the mean reward, and `difficulty` the weights of three prompts by their
success rate, and their shares of a step. `recipes/pages/explain/targets.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import tyro
from figures import program, show

from tokenrl import Estimator
from tokenrl.lab import Problem, exact_moments, tabular_problem

SIZE = 8
"""Completions of a group."""
DG = "dg,baseline=group_mean"
ESTIMATORS = ("tpo,eta=0.1", "tpo", "tpo,eta=10", DG, "grpo", "rloo")
PASSES = [(name, 1, False) for name in ("tpo", DG, "grpo", "rloo")]
PASSES += [("tpo", 4, False), ("tpo", 4, True), ("grpo", 4, False)]
"""An estimator, its passes, and whether each pass takes the policy of that moment for the one that sampled."""
RATES = (0.1, 2.0, 20.0)
"""Learning rates, which the passes share."""
WRONG = {"equally probable": None, "one right, one wrong": 1, "one right, 1,000 wrong": 1000}
"""Wrong answers, all of one probability, for each right one; None for as many as make all equally probable."""


def bandit(seed: int) -> Problem:
    """Three answers with random logits and rewards."""
    return tabular_problem(seed, length=1)


def rare(_: int) -> Problem:
    """Three answers with the chances .9, .05 and .05 and the rewards 0, 1 and -3."""
    chances, rewards = torch.tensor([[18, 1, 1], [0, 1, -3]], dtype=torch.double)
    return replace(tabular_problem(0, length=1, logits=chances.log()), rewards=rewards[None])


def direction(problems: int) -> None:
    """Print the cosines of the expected step with four gradients, by the completions of a group."""

    def cosines(
        name: str, size: int, problem_of: Callable[[int], Problem], seed: int
    ) -> dict[str, float]:
        estimator, problem = Estimator.preset(name), problem_of(seed)
        moments = exact_moments(estimator, problem, group_size=size)
        p, rewards = problem.chances[0], problem.totals[0]
        centred = rewards - p @ rewards
        u = centred / (p @ centred**2).sqrt()
        squared = p**2 / (p @ p)
        weights = {
            "reward": p * centred,
            "limit": (p.log() * 2 + u / estimator.eta).softmax(0) - squared,
            "large": squared * (u - squared @ u),
            "small": (u == u.max()).double() - squared,
        }
        targets = {name: (x @ problem.scores[0, :, 0])[None] for name, x in weights.items()}
        named = {name: replace(moments, target=x).cosine for name, x in targets.items()}
        return named | {f"least {name}": cosine for name, cosine in named.items()}

    for problem_of in (bandit, rare):
        rows = {
            (name, size): partial(cosines, name, size, problem_of)
            for name in ESTIMATORS
            for size in (2, 4, SIZE)
        }
        show(f"Cosines by estimator and size of the group. {problem_of.__doc__}", rows, problems)


def passes(problems: int) -> None:
    """Print what the passes over a group change in the mean reward, on average over all groups."""
    groups = torch.cartesian_prod(*[torch.arange(3)] * SIZE)  # [C, K]
    mask = torch.ones(groups.numel(), 1, dtype=torch.double)

    def changes(name: str, count: int, renewed: bool, seed: int) -> dict[str, float]:
        estimator, problem, named = Estimator.preset(name), bandit(seed), {}
        rewards, log_policy = problem.totals[0], problem.logprobs[0, :, 0]
        chances, drawn = log_policy[groups].sum(-1).exp(), rewards[groups].flatten()
        for rate in RATES:
            logits = log_policy.expand(len(groups), 3)
            for _ in range(count):
                leaf = logits.detach().requires_grad_()
                now = leaf.log_softmax(-1).gather(1, groups).view(-1, 1)
                old = now.detach() if renewed else log_policy[groups].view(-1, 1)
                advantages = estimator.advantages(
                    drawn, mask, group_size=SIZE, logprobs=old, present_logprobs=now.detach()
                )
                loss = estimator.loss(now, advantages.policy, mask / SIZE, mask, old_logprobs=old)
                logits = leaf.detach() - rate / count * torch.autograd.grad(loss, leaf)[0]
            change = float(chances @ (logits.softmax(-1) - problem.chances) @ rewards)
            named |= {f"{rate:g}": change, f"least {rate:g}": change}
        return named

    rows = {arm: partial(changes, *arm) for arm in PASSES}
    show("Estimator, passes, renewed: change of the mean reward by learning rate", rows, problems)


def difficulty(_: int) -> None:
    """Print the weight of grad p of a prompt by its success rate p, and its share of a step with all three."""

    def weights(name: str, wrong: int | None, _: int) -> dict[str, float]:
        named, steps = {}, {}
        for p in (0.01, 0.3, 0.9):
            chances = torch.tensor([[p, 1 - p]], dtype=torch.double)
            answers = torch.tensor([[1, wrong or 1 / p - 1]], dtype=torch.double)
            problem = tabular_problem(0, vocabulary=2, length=1, logits=chances.log())
            problem = replace(
                problem,
                rewards=torch.eye(2, dtype=torch.double)[:1],
                logprobs=problem.logprobs - answers.log()[..., None],
                environment=answers,
            )
            moments = exact_moments(Estimator.preset(name), problem, group_size=SIZE)
            named[f"weight {p}"] = moments.scale
            steps[f"share {p}"] = float(moments.mean[0, 0])
        return named | {title: step / sum(steps.values()) for title, step in steps.items()}

    for title, wrong in WRONG.items():
        rows = {name: partial(weights, name, wrong) for name in ESTIMATORS}
        show(f"Weights and shares by success rate. Answers: {title}", rows, 1)


main = program(direction, passes, difficulty)


if __name__ == "__main__":
    tyro.cli(main)
