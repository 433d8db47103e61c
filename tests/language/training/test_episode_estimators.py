"""Every kind of estimator trains on episodes, and none reads a number of a token of the environment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_environments import Guess
from tiny_models import ENDS, gradient, make_learner, make_policy, one_step, quickly, weights

from tokenrl.core import Estimator
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.training import learner, rows as collect

ESTIMATORS = {
    **{
        name: Estimator.preset(name)
        for name in ("remax", "ppo", "a2c", "otb", "optimal", "dapo", "spo")
    },
    **{
        name: Estimator.preset(name)
        for name in ("gspo", "gmpo", "cispo", "prime_rl", "gdpo", "unsloth")
    },
    **{name: Estimator.preset(name) for name in ("openrlhf_default", "trl_rloo")},
    "timestep mean": Estimator.preset("reinforce_timestep_mean", beta=0.1),
    "centred": Estimator(importance="token", importance_centre=True, ratio="token"),
    "centred, top 3": Estimator(importance_centre=True, importance_centre_top=3),
    "truncated": Estimator(truncations="mask", aggregation="token_mean", returns="reward_to_go"),
}
ALIKE = {"otb", "gmpo", "prime_rl", "gdpo", "unsloth", "openrlhf_default", "trl_rloo"}
"""Those that others are like in what they read of a token."""
COLUMNS = ("logprobs", "sampling_logprobs", "entropy", "score_norms", "hidden")


def trained(estimator, factory=Guess, **options):
    """A step on episodes, of two updates where there is a ratio: weights and last gradient, and metrics."""
    policy = make_policy(max_position_embeddings=128, initializer_range=0.1)
    policy.eos_ids = ENDS
    if estimator.needs_reference:
        policy.reference = make_policy(seed=1, max_position_embeddings=128).model.requires_grad_(
            False
        )
    shape = {"num_minibatches": 1 + (estimator.ratio != "none"), "max_completion_length": 10}
    learner = make_learner(policy, estimator, **shape | options)
    rewards = Rewards([], environments=Environments(factory, timeout=0.3))
    record = one_step(learner, reward=rewards)
    parts = [weights(policy.model), gradient(policy.model)]
    parts += [] if learner.critic is None else [weights(learner.critic.head)]
    return torch.cat(parts), record.metrics


def disturb(monkeypatch, where):
    """Change what is computed of the tokens that `where` chooses by their mask, and count them."""
    changed = []

    def other(x, mask):
        cells = where(mask)
        changed.append(int(cells.sum()))
        return (
            None
            if x is None
            else torch.where(cells if x.ndim == 2 else cells[:, :, None], 2 * x - 3, x)
        )

    def scored(compute):
        return lambda model, rows, *args, **kw: type(out := compute(model, rows, *args, **kw))(
            *(other(x, rows.mask) for x in out)
        )

    def sampled(*args):
        rows = sample(*args)
        return replace(rows, **{name: other(getattr(rows, name), rows.mask) for name in COLUMNS})

    sample = collect.sample
    monkeypatch.setattr(collect, "sample", sampled)
    for name in ("score_in_parts", "score"):
        monkeypatch.setattr(learner, name, scored(getattr(learner, name)))
    return changed


@pytest.mark.parametrize("name", quickly(ESTIMATORS, ALIKE))
def test_no_estimator_reads_what_is_computed_of_the_environments_tokens(name, monkeypatch):
    """Whatever their log-probabilities, entropies and hidden states are, the update has the same bits."""
    usual, measured = trained(ESTIMATORS[name])
    assert usual.isfinite().all() and measured["episodes/turns"] > 1
    with monkeypatch.context() as patch:
        changed = disturb(patch, torch.logical_not)
        again, metrics = trained(ESTIMATORS[name])
    assert sum(changed) > 50 and torch.equal(again, usual)
    assert metrics == pytest.approx(measured, rel=0, abs=0, nan_ok=True)
    disturb(monkeypatch, torch.Tensor.bool)  # those of the policy do count
    assert not torch.equal(trained(ESTIMATORS[name])[0], usual)


class Flat(Guess):
    """Rewards nothing if the number of reset is even, for all of a group, as its seed is shared."""

    def step(self, text):
        observation, reward, *rest = super().step(text)
        return observation, reward * (self.number % 2), *rest


def test_groups_of_equal_rewards_are_replaced_by_episodes_of_new_prompts():
    parts, metrics = trained(ESTIMATORS["dapo"], Flat)
    _, never = trained(ESTIMATORS["dapo"], Flat, max_refills=0)
    assert parts.isfinite().all() and metrics["refilled"] > 0 == never["refilled"]
    # the test has few new prompts
    assert metrics["frac_reward_zero_std"] < never["frac_reward_zero_std"]
