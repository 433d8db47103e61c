"""When a policy counts as destroyed: at the step where it happens, and never for the noise of small steps."""

import json
import math

import numpy as np
import pytest

from tokenrl.core.destroyed import Watch

BEFORE = {"reward": 0.2, "reward_stderr": 0.012}


def row(reward, *, error=0.03, equal=0.2, entropy=1.0, cut=0.0, norm=5.0):
    names = ("reward", "reward_stderr", "frac_reward_zero_std", "entropy", "completions/clipped_ratio")
    return dict(zip(names, (reward, error, equal, entropy, cut), strict=True)) | {"grad_norm": norm}


def watched(rows, *, before=BEFORE, groups=16, solved=None):
    """What was found, and the steps at which it was told."""
    watch = Watch(before, groups, solved)
    told = [step for step, metrics in enumerate(rows, start=1) if watch.see(step, metrics)]
    return watch.found, told


def flat(reward=0.0, **how):
    return row(reward, error=0.0, equal=1.0, norm=0.0, **how)


def test_a_policy_that_is_lost_at_once_is_noticed_within_four_steps_and_told_once():
    rows = [row(0.2, norm=6.9), row(0.07, equal=0.7, norm=17.0), row(0.03, equal=0.9), *[flat()] * 9]
    found, told = watched(rows)
    assert told == [4] and found.flag == "policy-destroyed" and found.norms == (5.0, 17.0)
    assert (found.before, found.when, found.since) == (0.2, "evaluation before training", 2)
    text = str(found)
    assert "fell from 0.2 (evaluation before training) to 0.0333, and 87% of the groups" in text
    assert text.endswith("the gradient norm before clipping was 5 to 17.")


def test_what_was_learnt_in_training_counts_too():
    rows = [row(0.2 + 0.06 * i) for i in range(8)] + [row(0.5 - 0.1 * i, equal=0.2 * i) for i in range(5)]
    found, _ = watched([*rows, *[flat(0.1)] * 3])
    assert found.when == "steps 6 to 8" and found.before == pytest.approx(0.56)
    assert watched([*rows[:8], *[flat(0.4)] * 9])[0] is None  # half of it is kept


@pytest.mark.parametrize(
    "sign, words",
    [
        ({"equal": 0.9}, "% of the groups had equal rewards"),
        ({"entropy": 0.1}, "nats, down from 1"),
        ({"cut": 0.8}, "% of the completions were cut"),
    ],
)
def test_a_fall_needs_a_sign_that_the_policy_is_lost(sign, words):
    (found,) = watched([row(0.2), *[row(0.0, **sign)] * 5])[0].signs
    assert words in found
    assert watched([row(0.2), *[row(0.0)] * 5])[0] is None


def test_entropy_that_is_lost_before_half_is_learnt_is_a_collapse():
    rows = [row(0.2, entropy=4.3), *[row(0.45, entropy=0.4, equal=0.8)] * 3]
    found, told = watched(rows, solved=0.95)
    assert found.flag == "entropy-collapsed" and told == [4]
    assert "has collapsed" in str(found) and "was 0.45, after 0.2 (step 1)" in str(found)
    assert watched(rows, solved=0.6)[0] is None  # more than half
    assert watched(rows)[0] is None  # a gain, and nobody knows how much there is to gain
    assert watched([rows[0], *[row(0.19, entropy=0.4)] * 3])[0].flag == "entropy-collapsed"


def test_training_prompts_that_are_harder_than_the_held_out_ones_are_no_loss():
    easy = {"reward": 0.8, "reward_stderr": 0.01}
    assert watched([row(0.2, equal=0.8)] * 50, before=easy)[0] is None
    assert watched([row(0.8), *[flat()] * 5], before=easy)[0] is not None


def test_a_step_of_one_prompt_says_nothing_of_its_noise():
    rows = [{name: x for name, x in flat().items() if name != "reward_stderr"}] * 50
    assert watched(rows, groups=1)[0] is None


@pytest.mark.parametrize("groups, generations", [(2, 8), (4, 4), (16, 8)])
def test_noise_is_no_loss_and_a_loss_in_noise_is_found(groups, generations):
    """8 runs of 300 steps whose policy stays as it is; then its reward falls to nothing."""
    generator = np.random.default_rng(0)

    def step(chance):
        prompts = generator.beta(0.3, 0.3 * (1 - chance) / chance, groups)  # most prompts are easy or hard
        rewards = generator.random((groups, generations)) < prompts[:, None]
        means = rewards.mean(axis=1)
        error = means.std(ddof=1) / math.sqrt(groups)
        return row(means.mean(), error=error, equal=np.mean((means == 0) | (means == 1)))

    for _ in range(8):
        rows = [step(0.3) for _ in range(300)]
        assert watched(rows, before={"reward": 0.3, "reward_stderr": 0.02}, groups=groups)[0] is None
        found, _ = watched([*rows, *[step(1e-9) for _ in range(200)]], groups=groups)
        assert 300 < found.step <= 300 + 12 * max(3, 32 // groups)


@pytest.mark.parametrize("at", [0, 1, 4, 9, 14])
def test_a_watch_of_another_run_continues_from_its_state(at):
    rows = [row(0.2 + 0.06 * i, norm=i) for i in range(9)] + [row(0.5, equal=0.2 * i) for i in range(3)]
    rows += [flat(0.1)] * 4
    whole, told = Watch(BEFORE, 16, solved=0.9), []
    for step, metrics in enumerate(rows, start=1):
        if step == at + 1:
            state = json.loads(json.dumps(whole.state_dict()))
        told.append(whole.see(step, metrics))
    again = Watch({}, groups=1)
    again.load_state_dict(state)
    assert [again.see(step, rows[step - 1]) for step in range(at + 1, len(rows) + 1)] == told[at:]
    assert again.found == whole.found is not None and str(again.found) == str(whole.found)
    assert again.state_dict() == whole.state_dict()
    finished = Watch({}, groups=1)
    plain = whole.state_dict()
    assert json.loads(json.dumps(plain)) == plain  # no tuples
    finished.load_state_dict(plain)
    assert finished.found == whole.found and finished.see(99, rows[-1]) is None
