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
from tokenrl.runs.reader import read_run


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


def test_a_text_has_the_largest_of_its_rewards_and_its_place_by_that():
    assert best_rows(torch.tensor([10.0, 0.0, 5.0]), "AAB") == [0, 2]
    assert best_rows(torch.tensor([2.0, 1.0, 3.0, 3.0]), "abab") == [2, 3]


def test_a_molecule_that_is_written_again_and_earns_nothing_then_stays(steps):
    """As where repeated completions earn 0: what is replayed in the third step are texts that earned something."""
    seen = set()

    def first_time(completion_ids, **_):
        texts = [*map(tuple, completion_ids)]
        earned = [2.0 + len(text) if text not in seen else 0.0 for text in texts]
        seen.update(texts)
        return earned

    learner = started(replay=2, replay_memory=2)
    places = [0, 0, 0, 0]
    for step in (1, 1, 2):  # the second step writes the completions of the first one again
        one_step(learner, reward=first_time, step=step, places=places)
    assert not steps[1].rewards[~steps[1].replayed].any()
    replayed = steps[2].rewards[steps[2].replayed]
    assert len(replayed) == 8 and (replayed > 2).all()


def test_rewards_that_differ_from_replayed_ones_are_a_signal(tmp_path):
    """A run whose new completions all earn the same still learns from those of its first step."""

    def at_first(completions, trainer_state, **_):
        is_first = trainer_state.global_step == 0
        return [(1 + number) * is_first for number in range(len(completions))]

    shape = {"max_steps": 6, "stop_after_zero_spread": 2, "prompts_per_step": 1, "replay_memory": 2}
    task = letter_task(at_first, ["ab>"] * 2, eval_prompts=[{"prompt": "ab>"}])
    for estimator in ("rloo", "reinforce"):  # which compares no rows of a group
        run = letters_trained(tmp_path / estimator, task, replay=2, estimator=estimator, **shape)
        assert run.steps == 6 and not any(row["reward_std"] for row in run.metrics[2:])
        assert run.metrics[-1]["frac_reward_zero_std"] == 0
    with stopped("there is nothing to learn from"):
        letters_trained(tmp_path / "none", task, **shape, eval_generations=4)


def test_replayed_rows_count_in_no_effective_sample_size(steps):
    learner = started(replay=2)
    learner.policy.eos_ids = ENDS
    learner.generator = Engine(learner.policy)
    learner.generator.gap = 0.5  # of each token, so that weights follow lengths
    for step in (1, 2):
        metrics = one_step(learner, step=step).metrics
    rows = steps[1].take((~steps[1].replayed).nonzero().flatten())
    weights_of_rows = (-0.5 * rows.mask.sum(1)).double().exp()
    share = weights_of_rows.sum() ** 2 / (weights_of_rows**2).sum() / len(rows)
    assert metrics["sampling/effective_sample_size"] == pytest.approx(float(share), rel=1e-5)
    assert share < 0.9


def test_a_step_whose_new_completions_have_no_reward_stops_the_run_whatever_is_replayed():
    learner = started(replay=2)
    one_step(learner)
    with stopped("abstained from every completion of this step"):
        one_step(learner, step=2, reward=lambda completions, **_: [None] * len(completions))


def test_tables_hold_what_is_replayed_once_it_is(tmp_path):
    """A row that stands where no completion was kept yet is in none; examples for people are new ones."""
    shape = {"log_completions": 1, "max_steps": 2, "prompts_per_step": 1, "eval_every": 2}
    task = letter_task(vowel_reward, ["ab>"] * 2)
    run = read_run(letters_trained(tmp_path, task, replay=2, **shape).output_dir)
    tables = [[row for row in run.completions(2) if row["step"] == step] for step in (1, 2)]
    assert [len(table) for table in tables] == [4, 6]
    assert [row["replayed"] for row in tables[1]] == [False] * 4 + [True] * 2
    assert None not in [row["reward"] for table in tables for row in table]
    assert not any(row["replayed"] for row in examples(tables[1], 4))


def test_a_run_says_that_replay_is_biased(tmp_path, said):
    letters_trained(tmp_path, letter_task(vowel_reward), replay=2, quiet=False)
    assert "biased, as rewards choose the replayed completions" in said()
