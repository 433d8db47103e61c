"""What estimators with more needs get: greedy rewards, refilled groups, a critic, and a measured gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import (
    apart,
    completions,
    gradient,
    make_learner,
    make_policy,
    one_step,
    vowel_reward,
)

from tokenrl.core import Estimator
from tokenrl.core.baselines import RunningMean
from tokenrl.core.statistics import GradientDiagnostics
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rewarded import reward_rows
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.training.collect import Experience, greedy_rewards, refill, sample, step_rows
from tokenrl.language.training.critic import Critic
from tokenrl.language.training.step import training_step

PROMPTS = ["the cat", "a", "count to ten one two", "sat on the", "dog", "log on", "one", "ten"]


def by_word(prompts, completions, **_):
    """Equal rewards for the completions of every second prompt, different ones for the others."""
    dead = {"the cat", "sat on the"}
    return [0.5 if p in dead else float(len(c)) for p, c in zip(prompts, completions, strict=True)]


def start(estimator, reward, **options):
    learner = make_learner(make_policy(), estimator, prompts_per_step=4, num_generations=4, **options)
    rows = [{"prompt": p} for p in PROMPTS]
    return learner, Rewards(reward), [(i, row) for i, row in enumerate(rows[:4])], rows


def test_refilling_replaces_exactly_the_groups_that_teach_nothing():
    learner, rewards, prompts, rows = start("dapo", by_word)
    sampling = replace(learner.sampling, step=1)
    rollout = sample(learner, prompts, sampling)
    plain = Experience(prompts, rollout, reward_rows(learner.policy, rewards, rows[:4], rollout, step=0))
    dealt = []

    def more(count):
        dealt.append(count)
        return [(100 + len(dealt) * 10 + i, rows[4 + i]) for i in range(count)]

    out = refill(learner, rewards, sampling, plain, more)
    assert dealt == [2] and out.result.metrics["refilled"] == 2
    names = [out.prompts[i][1]["prompt"] for i in out.rollout.prompt_index.tolist()]
    assert names == ["dog"] * 4 + ["a"] * 4 + ["count to ten one two"] * 4 + ["log on"] * 4
    expected = by_word(names, learner.policy.decode(out.rollout.completion_ids, out.rollout.mask))
    assert out.result.total.tolist() == expected
    kept = plain.rollout.mask[4:12].sum(dim=1)
    assert torch.equal(out.rollout.mask[4:12].sum(dim=1), kept)  # the others are as they were


def test_refilling_gives_up_after_some_rounds_and_the_step_goes_on():
    learner, rewards, prompts, rows = start(
        "dapo", lambda completions: [1.0] * len(completions), max_refills=3
    )
    before = (
        gradient(learner.policy.model)
        if False
        else [p.detach().clone() for p in learner.policy.model.parameters()]
    )
    from tokenrl.core.baselines import RunningMean

    dealt = []

    def more(count):
        dealt.append(count)
        return [(100 + 10 * len(dealt) + i, rows[4 + i]) for i in range(count)]

    record = training_step(learner, rewards, RunningMean(), 1, prompts, more)
    assert dealt == [4, 4, 4] and record.metrics["refilled"] == 12
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.model.parameters(), strict=True))


def test_the_refilled_step_has_the_gradient_of_its_new_prompts():
    """A refilled step is the step of the prompts it ends with: same completions, same gradient."""
    learner, rewards, prompts, rows = start("dapo", by_word)
    training_step(learner, rewards, RunningMean(), 1, prompts, lambda n: [(50, rows[4]), (51, rows[5])])
    other, rewards, _, _ = start("dapo", by_word)
    ends = [(50, rows[4]), prompts[1], prompts[2], (51, rows[5])]
    training_step(other, rewards, RunningMean(), 1, ends, lambda n: pytest.fail("nothing to refill"))
    assert apart(gradient(learner.policy.model), gradient(other.policy.model)) < 1e-6


def test_remax_subtracts_the_reward_of_the_greedy_completion():
    learner, rewards, prompts, _ = start("remax", vowel_reward)
    found = greedy_rewards(learner, rewards, replace(learner.sampling, step=1), prompts)
    policy = learner.policy
    ids = policy.encode_all([row["prompt"] for _, row in prompts], max_completion_length=6)
    rollout = completions(policy, ids, num_generations=0, max_completion_length=6)
    texts = policy.decode(rollout.completion_ids, rollout.mask)
    kept = [row[m].tolist() for row, m in zip(rollout.completion_ids, rollout.mask, strict=True)]
    assert found.tolist() == vowel_reward(texts, kept)


def test_every_completion_has_the_greedy_reward_of_its_own_prompt():
    learner, rewards, prompts, rows = start("remax", vowel_reward)
    sampling = replace(learner.sampling, step=1)
    greedy = greedy_rewards(learner, rewards, sampling, prompts).tolist()
    rollout = sample(learner, prompts, sampling)
    own = Experience(prompts, rollout, reward_rows(learner.policy, rewards, rows[:4], rollout, step=0))
    found = step_rows(learner, rewards, sampling, own).greedy_rewards
    assert found.tolist() == pytest.approx([reward for reward in greedy for _ in range(4)])
    assert greedy != greedy[::-1]


def test_score_norms_are_those_of_the_softmax():
    policy = make_policy()
    shape = {"num_generations": 3, "max_completion_length": 5}
    assert completions(policy, [[3, 4, 5]], **shape).score_norms is None
    rollout = completions(policy, [[3, 4, 5]], keep_score_norms=True, **shape)
    logits = policy.model(torch.cat([rollout.prompt_ids.expand(3, -1), rollout.completion_ids], 1)).logits[
        :, 2:-1
    ]
    p = logits.softmax(-1)
    onehot = torch.nn.functional.one_hot(rollout.completion_ids, p.shape[-1])
    expected = (onehot - p).square().sum(-1)
    assert torch.allclose(rollout.score_norms[rollout.mask], expected[rollout.mask], atol=1e-5)


def test_hidden_states_are_those_before_each_action():
    policy = make_policy()
    shape = {"num_generations": 3, "max_completion_length": 5}
    rollout = completions(policy, [[3, 4, 5], [6]], keep_hidden=True, **shape)
    for row in range(6):
        prompt = rollout.prompt_ids[row // 3][rollout.prompt_mask[row // 3]]
        whole = torch.cat([prompt, rollout.completion_ids[row]])[None]
        states = policy.model(whole, output_hidden_states=True).hidden_states[-1][0, len(prompt) - 1 : -1]
        keep = rollout.mask[row]
        assert torch.allclose(rollout.hidden[row][keep], states[keep], atol=1e-5)
    assert completions(policy, [[3]], **shape).hidden is None


def test_a_critic_learns_what_each_prompt_earns_and_leaves_the_policy_alone():
    policy = make_policy()
    before = [p.detach().clone() for p in policy.model.parameters()]
    sampling = Sampling(3, 4, keep_hidden=True)
    batch = TransformersGenerator(policy).generate([[3, 4], [9, 8, 7]], sampling, None)
    returns = torch.tensor([1.0, -2.0])[batch.prompt_index][:, None].expand(batch.mask.shape)
    critic = Critic(batch.hidden.shape[-1], policy.device, learning_rate=3e-2, iterations=20)
    assert torch.equal(critic.values(batch.hidden), torch.zeros(batch.mask.shape))
    weights = batch.mask / batch.mask.sum()
    accelerator = make_learner(policy).accelerator
    losses = [
        critic.update(Estimator.preset("a2c"), batch.hidden, returns, weights, accelerator) for _ in range(15)
    ]
    assert losses[-1] < 0.01 * losses[0]
    assert torch.allclose(critic.values(batch.hidden)[batch.mask], returns[batch.mask], atol=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


@pytest.mark.parametrize("preset", ["a2c", "ppo"])
def test_the_values_are_read_before_they_are_taught(preset):
    """In the first step every value is 0, so that the first gradient is that without a critic."""
    learner = make_learner(make_policy(), preset)
    one_step(learner)
    plain = make_learner(
        make_policy(), Estimator.preset(preset, baseline="none", returns="reward_to_go", lam=1.0)
    )
    one_step(plain)
    if preset == "a2c":
        assert apart(gradient(learner.policy.model), gradient(plain.policy.model)) < 1e-6
    assert learner.critic.values(torch.randn(1, 1, 32)).abs().sum() > 0  # and taught afterwards


def test_measuring_changes_nothing_and_measures_the_halves():
    parts, plain = make_learner(make_policy()), make_learner(make_policy())
    parts.diagnostics = GradientDiagnostics(1)
    first = one_step(parts)
    one_step(plain)
    assert apart(gradient(parts.policy.model), gradient(plain.policy.model)) < 1e-6
    assert set(first.metrics) >= {"gradient/snr", "gradient/noise_scale"}
    assert "gradient/cosine_previous" not in first.metrics
    assert -1 <= one_step(parts, step=2).metrics["gradient/cosine_previous"] <= 1


def test_signal_and_noise_are_unbiased():
    """Halves with a known mean and variance: the two estimates average to |E g|^2 and tr Var."""
    torch.manual_seed(0)
    mean, deviation, dimension = torch.full((50,), 0.3), 1.0, 50
    diagnostics, ratios = GradientDiagnostics(1), []
    for _ in range(4000):
        halves = mean + deviation * torch.randn(2, dimension)  # each estimates the mean
        out = diagnostics.metrics(halves[0] / 2, halves.sum(0) / 2, 8)
        ratios.append(out["gradient/snr"])
    truth = float(mean.square().sum()) / (dimension * deviation**2 / 2)
    assert np.median(ratios) == pytest.approx(truth, rel=0.05)
