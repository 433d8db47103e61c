"""A critic that learns first: what follows the policy begins where the policy may move."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from tiny_models import letter_task, letters, letters_trained, weights

from tokenrl.control import train_agent
from tokenrl.core import Estimator


def share_of_a(completions, **_):
    return [text.count("a") / max(1, len(text)) for text in completions]


def trained(folder, **options):
    options = {"estimator": "a2c", "value_warmup": 4, "max_steps": 6} | options
    return letters_trained(folder, letter_task(share_of_a), **options)


def test_the_weight_of_the_kl_waits_for_the_policy(tmp_path):
    estimator = Estimator.preset("a2c", beta=0.1, kl_placement="loss")
    run = trained(tmp_path, estimator=estimator, target_kl=0.5, kl_gain=1.0)
    used = [row["kl_coef"] for row in run.metrics[1:]]
    assert used[:5] == [0.1] * 5 and used[5] != 0.1  # as the KL of the fifth step says


def test_so_does_the_patience_of_a_run(tmp_path):
    """Evaluations of a policy that cannot move yet are all equal, and those are not counted."""
    run = trained(tmp_path, patience=1, eval_every=1, best_metric="less:entropy")
    assert (run.exit_reason, run.steps) == ("finished", 6)


def test_a_check_tries_the_update_of_the_policy(tmp_path):
    start = weights(letters()[0])
    check = trained(tmp_path, check=True)
    assert check.exit_reason == "check" and not torch.equal(weights(check.policy.model), start)
    broken = {"reward_scale": 1e30, "estimator": "a2c", "value_warmup": 1, "max_steps": 2}
    agent = train_agent(env="bandit", num_envs=4, eval_episodes=4, check=True, quiet=True, **broken)
    assert "skipped" in agent.flags  # its gradient is not finite


def test_a_run_in_which_the_critic_alone_would_learn_is_refused(tmp_path):
    with refused("value_warmup=6 is not less than max_steps=6, so the critic alone would learn"):
        trained(tmp_path / "run", value_warmup=6)
    with refused("value_warmup=3 is not less than max_steps=3"):
        train_agent(env="bandit", estimator="a2c", value_warmup=3, max_steps=3)


@pytest.mark.parametrize(("warmup", "words"), [(4, "the 2 steps in which"), (0, "max_steps=6")])
def test_the_warm_up_of_the_rate_is_compared_with_the_steps_of_the_policy(
    tmp_path, said, warmup, words
):
    run = trained(tmp_path, value_warmup=warmup, warmup_steps=6, quiet=False)
    assert f"warmup_steps=6 is not less than {words}" in said()
    rates = [row["learning_rate"] for row in run.metrics[1:]]
    assert rates == [max(0, step - warmup) / 6 * 0.01 for step in range(6)]


def test_without_a_critic_it_has_no_effect_as_the_run_says(tmp_path, said):
    run = trained(tmp_path / "run", estimator="rloo", quiet=False)
    output = said()
    assert "value_warmup=4 has no effect, because the estimator has no critic" in output
    assert "learns alone" not in output
    other = trained(tmp_path / "other", estimator="rloo", value_warmup=0)
    assert run.metrics == other.metrics
