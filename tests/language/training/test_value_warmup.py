"""A critic that learns first: what follows the policy begins where the policy may move."""

from __future__ import annotations

from refusals import refused
from tiny_models import letter_task, letters_trained

from tokenrl.control import train_agent
from tokenrl.core import Estimator


def trained(folder, **options):
    task = letter_task(lambda completions: [float(text.count("a")) for text in completions])
    options = {"estimator": "a2c", "value_warmup": 4, "max_steps": 6} | options
    return letters_trained(folder, task, **options)


def test_the_weight_of_the_kl_the_patience_and_the_rate_wait_for_the_policy(tmp_path):
    options = {
        "estimator": Estimator.preset("a2c", beta=0.1, kl_placement="loss"),
        "target_kl": 0.5,
    }
    options |= {"patience": 2, "eval_every": 1, "best_metric": "less:entropy", "warmup_steps": 1}
    run = trained(tmp_path, **options)
    assert run.steps == 6
    used, rates = ([row[x] for row in run.metrics[1:]] for x in ("kl_coef", "learning_rate"))
    assert used[:5] == [0.1] * 5 and used[5] != 0.1  # as the KL of the fifth step says
    assert rates == [0.0] * 5 + [0.01]


def test_a_check_tries_the_update_of_the_policy():
    broken = {"reward_scale": 1e30, "estimator": "a2c", "value_warmup": 1, "max_steps": 2}
    agent = train_agent(env="bandit", num_envs=4, eval_episodes=4, check=True, quiet=True, **broken)
    assert "skipped" in agent.flags  # its gradient is not finite


def test_a_run_in_which_the_critic_alone_would_learn_or_without_one_is_refused(tmp_path):
    options = {"env": "bandit", "estimator": "a2c", "value_warmup": 3, "max_steps": 3}
    for change, words in (
        ({}, "is not less than max_steps=3"),
        ({"estimator": "rloo"}, "lets the"),
    ):
        for start in (train_agent, lambda env, **given: trained(tmp_path, **given)):
            with refused(f"value_warmup=3 {words}"):
                start(**options | change)
