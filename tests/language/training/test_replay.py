"""Replayed completions: which are kept, what they do to a step and its expectation, and what they leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from refusals import stopped
from tiny_models import (
    ENDS,
    Engine,
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
from tokenrl.language.training.experience import examples
from tokenrl.language.training.replay import Replay, best_rows
from tokenrl.runs.metrics import read_completions


def started(estimator="rloo", **options):
    """A learner in float64, whose old rows have other log-probabilities after a step."""
    policy = make_policy("gpt2", dtype="float64", initializer_range=0.1, vocabulary=90)
    return make_learner(policy, estimator, learning_rate=0.05, **options)


@pytest.fixture
def steps(monkeypatch):
    """The rows of each step, new and replayed ones."""
    rows, join = [], Replay.join
    monkeypatch.setattr(Replay, "join", lambda *of: rows.append(join(*of)) or rows[-1])
    return rows


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_running_mean", "a2c", "optimal"])
def test_a_step_before_which_nothing_is_kept_is_one_without_replay(estimator):
    results = []
    for replay in (0, 2):
        learner, memory = started(estimator, replay=replay), RunningMean(0.9, 0.2)
        record = one_step(learner, running_mean=memory)
        moved = torch.cat([weights(learner.policy.model), gradient(learner.policy.model)])
        results.append((record.metrics, memory.state_dict(), moved))
    (metrics, mean, moved), (others, other_mean, also) = results
    others["padding"] = metrics["padding"]  # of rows that abstain
    assert apart(also, moved) < 1e-12 and other_mean == mean
    assert others == pytest.approx(metrics, rel=1e-6)  # a critic computes in float32


@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
def test_replayed_rows_count_with_the_weights_of_the_policy_that_drew_them(importance, steps):
    learner = started(Estimator.preset("reinforce", importance=importance), replay=2)
    one_step(learner)
    before = copy.deepcopy(learner.policy.model.state_dict())
    one_step(learner, step=2)
    update = gradient(learner.policy.model)
    first, rows = steps
    old = first.rewards[first.valid].tolist()
    assert rows.replayed.view(-1, 5).tolist() == [[False] * 3 + [True] * 2] * 4
    drawn = rows.completion_ids[rows.replayed].view(4, 2, -1)
    assert (drawn[:, 0] != drawn[:, 1]).any(dim=1).all()
    assert rows.valid.all() and {*rows.rewards[rows.replayed].tolist()} <= {*old}

    learner.policy.model.load_state_dict(before)
    learner.policy.model.zero_grad()
    logprobs = learner.score(rows).logprobs
    logs = (logprobs.detach() - rows.sampling_logprobs) * rows.mask
    assert logs[~rows.replayed].abs().max() < 1e-6 and logs[rows.replayed].abs().max() > 1e-3
    factors = {"none": logs * 0 + 1, "token": logs.exp(), "sequence": logs.sum(1)[:, None].exp()}
    terms = rows.rewards[:, None] * factors[importance] * logprobs * rows.mask
    (-terms.sum() / len(rows)).backward()
    assert apart(update, gradient(learner.policy.model)) < 1e-6


def test_the_best_distinct_texts_are_kept_with_their_latest_log_probabilities():
    rewards = torch.tensor([1.0, 5.0, 3.0, 5.0, 0.0, 1.0, 3.0])
    assert best_rows(rewards, "abcbdae") == [3, 2, 6, 5, 4]
    assert best_rows(torch.tensor([10.0, 0.0, 5.0]), "AAB") == [0, 2]  # the largest of its rewards
    draws = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert sum(float(pair[best_rows(pair, "AA")]) for pair in draws) / 4 == 0.75  # a noisy reward


@pytest.mark.parametrize(
    "estimator", ["rloo", "reinforce"]
)  # the second compares no rows of a group
def test_completions_that_earn_something_the_first_time_alone_stay_and_are_a_signal(
    tmp_path, estimator
):
    """As where repeated molecules earn 0: a text keeps its largest reward, with which later ones are compared."""
    seen = set()

    def first_time(completions, **_):
        new = [text not in seen for text in completions]
        seen.update(completions)
        return [float(is_new and len(seen) < 9) for is_new in new]

    shape = {
        "max_steps": 6,
        "stop_after_zero_spread": 2,
        "prompts_per_step": 1,
        "eval_generations": 0,
    }
    shape |= {"replay": 2, "replay_memory": 2, "log_completions": 1, "estimator": estimator}
    task = letter_task(first_time, ["ab>"] * 2, eval_prompts=[{"prompt": "ab>"}])
    run = letters_trained(tmp_path, task, **shape)
    assert run.steps == 6 and not any(row["reward"] for row in run.metrics[4:])
    assert run.metrics[-1]["frac_reward_zero_std"] == 0
    for step in (1, 6):  # a row that stands where nothing was kept yet is in no table
        path = run.output_dir / "completions" / f"step_{step:06d}.parquet"
        rows = read_completions(path)
        replayed = [row["reward"] for row in rows if row["replayed"]]
        assert (len(rows), replayed) == ((4, []) if step == 1 else (6, [1.0, 1.0]))
    assert not any(row["replayed"] for row in examples(rows, 4))


def test_replayed_rows_count_in_no_effective_sample_size_and_in_no_abstention(steps):
    learner = started(replay=2)
    learner.policy.eos_ids = ENDS
    learner.generator = Engine(learner.policy)
    learner.generator.gap = 0.5  # of each token, so that weights follow lengths
    for step in (1, 2):
        metrics = one_step(learner, step=step).metrics
    rows = steps[1]
    sizes = (-0.5 * rows.mask.sum(1)[~rows.replayed]).double().exp()
    share = float(sizes.sum() ** 2 / (sizes**2).sum() / len(sizes))
    assert metrics["sampling/effective_sample_size"] == pytest.approx(share, rel=1e-5) != 1
    with stopped("abstained from every completion of this step"):
        one_step(learner, step=3, reward=lambda completions, **_: [None] * len(completions))


def test_a_run_says_that_replay_is_biased(tmp_path, said):
    letters_trained(tmp_path, letter_task(vowel_reward), replay=2, quiet=False)
    assert "biased, as rewards choose the replayed completions" in said()
