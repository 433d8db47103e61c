"""What estimators with more needs get: greedy rewards, refills, a critic, a measured gradient, KL control."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from refusals import stopped
from tiny_models import (
    apart,
    completions,
    gradient,
    letter_task,
    letters_trained,
    make_learner,
    make_policy,
    one_step,
    vowel_reward,
    weights,
)

from tests.states import as_bits
from tokenrl.core import Estimator
from tokenrl.core.divergences import next_beta
from tokenrl.core.memories import RunningMean
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rewarded import averaged, completion_rows
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.training.experience import experience
from tokenrl.language.training.learner import Critic
from tokenrl.language.training.rows import collect_rows, refill, rows_of_step
from tokenrl.language.training.step import training_step
from tokenrl.runs.metrics import read_completions, read_metrics

PROMPTS = ["the cat", "a", "count to ten one two", "sat on the", "dog", "log on", "one", "ten"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]


def by_word(prompts, completions, **_):
    """Equal rewards of every second prompt, of which some are missing; different ones of the others."""
    rewards = [float(len(text)) for text in completions]
    for row, prompt in enumerate(prompts):
        if prompt in ("the cat", "sat on the"):
            rewards[row] = 0.5 if row else None
    return rewards


def start(estimator, function, **options):
    sizes = {"prompts_per_step": 4, "num_generations": 4}
    learner = make_learner(make_policy(), estimator, **sizes, **options)
    return learner, Rewards(function), list(enumerate(ROWS[:4])), replace(learner.sampling, step=1)


class Spare:
    """Draws further prompts, after those of a step, and remembers how many."""

    def __init__(self, *first):
        self.first, self.counts = list(first), []

    def learn(self, numbers, rewards):
        return {}

    def draw_prompts(self, count):
        self.counts.append(count)
        if self.first:
            return self.first.pop()
        return [(100 + len(self.counts) * 10 + i, ROWS[4 + i]) for i in range(count)]


def test_refilling_replaces_exactly_the_groups_that_teach_nothing():
    learner, rewards, prompts, sampling = start("dapo", by_word)
    plain, draw = collect_rows(learner, rewards, prompts, sampling), Spare()
    out = refill(learner, rewards, sampling, plain, draw)
    assert draw.counts == [2] and averaged(out.logged) == {"refilled": 2}
    names = [row["prompt"] for row in out.data]
    assert names == ["dog"] * 4 + ["a"] * 4 + ["count to ten one two"] * 4 + ["log on"] * 4
    assert out.prompt_index.tolist() == [110] * 4 + [1] * 4 + [2] * 4 + [111] * 4
    expected = by_word(names, learner.policy.decode(out.completion_ids, out.mask))
    assert out.rewards.tolist() == expected
    same = torch.arange(4, 12)  # the others are as they were
    for name, x in plain.take(same).columns().items():
        assert as_bits(x) == as_bits(out.take(same).columns()[name]), name


def test_refilling_gives_up_after_some_rounds_and_the_step_goes_on():
    flat = lambda completions: [1.0] * len(completions)  # noqa: E731
    learner, rewards, prompts, _ = start("dapo", flat, max_refills=3)
    before, draw = weights(learner.policy.model), Spare(prompts)
    record = training_step(learner, rewards, RunningMean(), 1, draw)
    assert draw.counts == [4, 4, 4, 4] and record.metrics["refilled"] == 12
    assert torch.equal(before, weights(learner.policy.model))


def scarce(completions, log_extra, log_metric, **_):
    log_extra("my_length", [len(text) for text in completions])
    log_metric("my_metric", 0.5)
    return [None if text.startswith("a") else float(len(text) > 2) for text in completions]


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (Estimator.preset("dapo", beta=0.1), {"target_kl": 0.1}),
        ("ppo", {"num_iterations": 2}),
        ("reinforce_running_mean", {}),
    ],
)
def test_no_reward_can_overwrite_what_a_run_writes(tmp_path, estimator, options):
    """Every name in the files of a run is refused, but for those that its reward logged."""
    options = {"estimator": estimator, "eval_every": 1, **options}
    letters_trained(tmp_path, letter_task(scarce), **options)
    (table, *_) = sorted((tmp_path / "completions").iterdir())
    lines = [*read_metrics(tmp_path / "metrics.jsonl"), *read_metrics(tmp_path / "timings.jsonl")]
    names = {"log_metric": {name for line in lines for name in line} - {"my_metric"}}
    names |= {"log_extra": read_completions(table)[0].keys() - {"my_length"}}
    for call, columns in names.items():
        for name in columns:
            rewards = Rewards(lambda completions, **logs: logs[call](name, torch.ones(1)) or [0.0])  # noqa: B023
            with stopped("own names"):
                rewards(["p"], ["c"], [[1]], {})


def test_every_completion_has_the_greedy_reward_of_its_own_prompt():
    learner, rewards, prompts, sampling = start("remax", vowel_reward)
    policy = learner.policy
    result = rows_of_step(learner, rewards, sampling, Spare(prompts)).greedy_rewards
    ids = policy.encode_all([row["prompt"] for _, row in prompts], max_completion_length=6)
    rollout = completions(policy, ids, num_generations=0, max_completion_length=6)
    kept = [
        ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.mask, strict=True)
    ]
    greedy = vowel_reward(None, kept)
    assert result.tolist() == pytest.approx([reward for reward in greedy for _ in range(4)])
    assert greedy != greedy[::-1]


def test_completions_whose_prompt_has_no_greedy_reward_keep_theirs_and_are_left_out():
    """A teacher_context reads them: of the other three rows of the first prompt all but that of the first."""
    read = []
    context = lambda prompt, rewards: read.append(rewards) or prompt  # noqa: E731
    options = {"teacher": "self", "teacher_context": context}
    learner, rewards, prompts, sampling = start("remax,beta=0.1", by_word, **options)
    rows = rows_of_step(learner, rewards, sampling, Spare(prompts))
    learnt = experience(learner, rows, sampling)
    assert rows.valid.tolist() == [False] + [True] * 15
    assert learnt.compared.tolist() == [False] * 4 + [True] * 12
    assert learnt.valid.equal(rows.valid)
    assert [read[0], read[1][1:]] == [[0.5] * 3, [0.5] * 2]


def test_the_values_are_read_before_they_are_taught():
    """In the first step every value is 0, so that the first gradient is that without a critic."""
    bare = Estimator.preset("a2c", baseline="none", returns="reward_to_go", lam=1.0)
    learner, plain = make_learner(make_policy(), "a2c"), make_learner(make_policy(), bare)
    one_step(learner)
    one_step(plain)
    assert apart(gradient(learner.policy.model), gradient(plain.policy.model)) < 1e-6
    assert learner.critic.values(torch.randn(1, 1, 32)).abs().sum() > 0  # and taught afterwards


KL = Estimator.preset("rloo", beta=0.5)


def test_the_weight_follows_the_measured_kl_and_the_next_step_uses_it():
    def learner_of(**settings):
        return make_learner(make_policy("gpt2", dtype="float64"), KL, **settings)

    learner = learner_of(target_kl=0.3, kl_gain=2.0)
    beta, seen = 0.5, []
    for step in (1, 2, 3, 4):
        metrics = one_step(learner, step=step).metrics
        assert metrics["kl_coef"] == pytest.approx(beta)
        beta = next_beta(beta, metrics["kl"], target=0.3, gain=2.0)
        seen.append(metrics["kl_coef"])
    # down from 0, up when beyond the target
    assert seen[1] < 0.5 < max(seen[2:]) * 2 and len(set(seen)) == 4
    assert learner.args.estimator.beta == 0.5  # the run's settings keep the start
    first, other = learner_of(target_kl=0.3, kl_gain=2.0), learner_of()
    one_step(first, step=2)
    one_step(other, step=2)
    other.estimator = replace(KL, beta=0.5 * (1 - 0.4))  # from a KL of 0, by the gain 2
    one_step(first, step=2)
    one_step(other, step=2)
    assert apart(gradient(first.policy.model), gradient(other.policy.model)) < 1e-12


def test_a_critic_learns_what_each_prompt_earns_and_leaves_the_policy_alone():
    policy = make_policy()
    before, sampling = weights(policy.model), Sampling(3, 4, keep_hidden=True)
    batch = TransformersGenerator(policy).generate([[3, 4], [9, 8, 7]], sampling, None)
    returns = torch.tensor([1.0, -2.0])[batch.prompt_index][:, None].expand(batch.mask.shape)
    critic = Critic(batch.hidden.shape[-1], policy.device, learning_rate=3e-2, iterations=20)
    assert not critic.values(batch.hidden).any()
    rest = returns, batch.mask / batch.mask.sum(), make_learner(policy).accelerator
    losses = [critic.update(Estimator.preset("a2c"), batch.hidden, *rest) for _ in range(15)]
    assert losses[-1] < 0.01 * losses[0]
    assert torch.allclose(critic.values(batch.hidden)[batch.mask], returns[batch.mask], atol=0.1)
    assert torch.equal(before, weights(policy.model))


def test_what_a_reward_logs_in_some_calls_only_survives_a_refill():
    """Groups 1 and 4 of four rows each are replaced: a metric is over all 16 + 8 rows that were rewarded."""

    def logs(prompts, completions, log_extra, log_metric):
        name = "early" if len(prompts) == 16 else "late"
        log_metric("rows", len(prompts))
        log_metric(name, 3.0)
        log_extra(name, list(range(len(prompts))))
        return by_word(prompts, completions)

    learner, rewards, prompts, sampling = start("dapo", logs)
    rows = collect_rows(learner, rewards, prompts, sampling)
    out = refill(learner, rewards, sampling, rows, Spare())
    means = {"rows": (16 * 16 + 8 * 8) / 24, "early": 3.0, "late": 3.0, "refilled": 2}
    assert averaged(out.logged) == means
    table = completion_rows(learner.policy, out, rewards.names, out.rewards)
    none = [None] * 4
    assert [row["early"] for row in table] == [*none, *range(4, 12), *none]
    assert [row["late"] for row in table] == [*range(4), *none, *none, *range(4, 8)]
