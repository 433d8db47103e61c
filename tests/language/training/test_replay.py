"""Replayed completions: which are kept, what they do to a step and its expectation, and what they leave alone."""

from __future__ import annotations

import itertools
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_models import (
    PROMPTS,
    apart,
    gradient,
    letter_task,
    letters_trained,
    make_learner,
    make_policy,
    one_step,
    vowel_reward,
    weights,
)

from tokenrl.core import Estimator
from tokenrl.core.memories import RunningMean
from tokenrl.errors import Refused
from tokenrl.language.training.replay import best_rows

RECIPE = Path(__file__).parents[3] / "recipes" / "enumeration" / "replay.py"


def started(estimator="rloo", **options):
    """A learner in float64, whose old rows have other log-probabilities after a step."""
    policy = make_policy("gpt2", dtype="float64", initializer_range=0.1, vocabulary=90)
    return make_learner(policy, estimator, learning_rate=0.05, **options)


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_running_mean", "a2c", "optimal"])
def test_a_step_before_which_nothing_is_kept_is_one_without_replay(estimator):
    results = []
    for replay in (0, 2):
        learner, memory = started(estimator, replay=replay), RunningMean(0.9, 0.2)
        record = one_step(learner, running_mean=memory)
        values = [] if learner.critic is None else [*learner.critic.head.state_dict().values()]
        results.append((learner, record, memory.state_dict(), values))
    (plain, alone, mean, values), (replaying, record, other_mean, other_values) = results
    assert apart(gradient(replaying.policy.model), gradient(plain.policy.model)) < 1e-12
    assert apart(weights(replaying.policy.model), weights(plain.policy.model)) < 1e-12
    # A critic computes in float32.
    assert record.metrics == pytest.approx(alone.metrics, rel=1e-6) and other_mean == mean
    assert all(apart(a, b) < 1e-6 for a, b in zip(values, other_values, strict=True))
    assert [row for row in record.rows() if not row["replayed"]] == [
        row | {"replayed": False} for row in alone.rows()
    ]


@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
def test_replayed_rows_count_with_the_weights_of_the_policy_that_drew_them(importance):
    estimator = Estimator.preset("reinforce", importance=importance)
    learner = started(estimator, replay=2, num_generations=3)
    first = {row["completion"]: row for row in one_step(learner).rows() if not row["replayed"]}
    steps = []
    join = learner.replay.join
    learner.replay.join = lambda *arguments: steps.append(join(*arguments)) or steps[-1]
    states = [p.detach().clone() for p in learner.policy.trainable_parameters()]
    record = one_step(learner, step=2)
    (rows,) = steps
    assert rows.replayed.view(-1, 5).tolist() == [[False] * 3 + [True] * 2] * (len(rows) // 5)
    table = record.rows()
    for row in table:
        assert not row["replayed"] or row["reward"] == first[row["completion"]]["reward"]

    learner.policy.model.zero_grad()
    for parameter, state in zip(learner.policy.trainable_parameters(), states, strict=True):
        parameter.data.copy_(state)
    logprobs = learner.score(rows).logprobs
    logs = (logprobs.detach() - rows.sampling_logprobs) * rows.mask
    assert logs[~rows.replayed].abs().max() < 1e-6 and logs[rows.replayed].abs().max() > 1e-3
    factor = {
        "none": torch.ones_like(logs),
        "token": logs.exp(),
        "sequence": logs.sum(dim=1, keepdim=True).exp(),
    }[importance]
    loss = -(rows.rewards[:, None] * factor * logprobs * rows.mask).sum() / len(rows)
    loss.backward()
    expected = gradient(learner.policy.model)
    learner.policy.model.zero_grad()
    again = started(estimator, replay=2, num_generations=3)
    one_step(again)
    one_step(again, step=2)
    assert apart(gradient(again.policy.model), expected) < 1e-6


def test_the_best_distinct_texts_are_kept_with_their_latest_log_probabilities():
    rewards = torch.tensor([1.0, 5.0, 3.0, 5.0, 0.0, 1.0, 3.0])
    assert best_rows(rewards, "abcbdae") == [3, 2, 6, 5, 4]
    assert best_rows(torch.tensor([2.0, 3.0, 1.0]), "aab") == [0, 2]


def test_a_step_draws_of_what_is_kept_each_row_once_and_equally_often():
    learner = started(replay=2, replay_memory=3, prompts_per_step=1)
    joined = []
    join = learner.replay.join
    learner.replay.join = lambda *arguments: joined.append(join(*arguments)) or joined[-1]
    one_step(learner, prompts=PROMPTS[:1])
    kept = dict(learner.replay.best)
    learner.replay.keep = lambda *_: None
    for step in range(2, 152):
        one_step(learner, step=step, prompts=PROMPTS[:1])
    (table,) = kept.values()
    assert len(table) == 3 and joined[0].rewarded.tolist() == [True] * 3 + [False] * 2
    counts = Counter()
    for rows in joined[1:]:
        old = rows.take(rows.replayed.nonzero().flatten()).rewards.tolist()
        assert len({*old}) == 2 and rows.valid.all()
        counts.update(old)
    assert sorted(counts) == sorted(table.rewards.tolist())
    assert all(abs(count - 100) < 30 for count in counts.values())


def test_rewards_that_choose_what_is_kept_bias_the_gradient_whatever_the_weights():
    recipe = runpy.run_path(str(RECIPE))
    bias, kept = recipe["bias"], recipe["kept"]
    rewards = torch.tensor([0.3, 0.1, 0.8])
    for pair in itertools.product(range(3), repeat=2):
        best = best_rows(rewards[list(pair)], [str(number) for number in pair])
        assert kept(rewards, pair, 2) == [pair[row] for row in best]
    for seed in range(4):
        best = [bias(seed, name, 1) for name in ("none", "tokens", "sequences")]
        every = [bias(seed, name, 2) for name in ("none", "tokens", "sequences")]
        assert min(best) > 0.1 and min(every[:2]) > 0.02 and every[2] < 1e-12


def test_a_run_says_that_replay_is_biased_and_what_it_excludes(tmp_path, said):
    task = letter_task(vowel_reward)
    letters_trained(tmp_path / "run", task, replay=2, quiet=False)
    assert "biased, as rewards choose the replayed completions" in said()
    with pytest.raises(Refused, match="replay was given as 1; it repeats completions of one turn"):
        estimator = Estimator(importance_centre=True)
        letters_trained(tmp_path / "other", task, replay=1, estimator=estimator)
