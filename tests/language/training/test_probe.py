"""The probe: pass@k and dead groups against their definitions, and one run of a tiny model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from tiny_models import LETTERS, letters

from tokenrl.errors import Refused
from tokenrl.language.policy.model import wrap
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.training.evaluation import all_equal, best_of, over_prompts, probe_policy

GRADED = np.array([0.5, -1.0, 2.0, 0.5, 0.5, 2.0])


def chen(n: int, c: int, k: int) -> float:
    """pass@k as the paper writes it (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("right", range(7))
def test_best_of_is_pass_at_k_for_rewards_of_0_and_1(right, k):
    rewards = np.array([1.0] * right + [0.0] * (6 - right))
    assert best_of(rewards, k) == pytest.approx(chen(6, right, k), abs=1e-12)


@pytest.mark.parametrize("k", range(1, 7))
def test_both_are_means_over_all_subsets(k):
    subsets = list(itertools.combinations(GRADED, k))
    assert best_of(GRADED, k) == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-12)
    assert all_equal(GRADED, k) == pytest.approx(np.mean([len(set(s)) == 1 for s in subsets]), abs=1e-12)
    assert math.isnan(best_of(GRADED[: k - 1], k)) and math.isnan(all_equal(GRADED[: k - 1], k))


def test_the_standard_error_is_over_prompts():
    found = over_prompts([1.0, 3.0, math.nan, 5.0])
    assert found.value == 3.0 and found.stderr == pytest.approx(2 / math.sqrt(3))
    assert math.isnan(over_prompts([1.0]).stderr) and math.isnan(over_prompts([math.nan]).value)


def test_a_policy_is_probed():
    tiny, rows, seen, paid = wrap(*letters()), [{"prompt": prompt} for prompt in LETTERS], [], []

    def reward(completions, completion_ids, **_):
        seen.extend(len(ids) for ids in completion_ids)
        found = [None if text.startswith("d") else float(text.startswith("a")) for text in completions]
        paid.extend(found)
        return found

    reward.binary = True
    found = probe_policy(tiny, rows, Rewards(reward), Sampling(3, 8))
    assert (found.prompts, found.samples, found.binary) == (16, 8, True)
    assert len(seen) == 128 and found.length == pytest.approx(np.mean(seen)) and found.longest == max(seen)
    assert list(found.dead_groups) == [2, 4, 8] and list(found.best_of) == [1, 2, 4, 8]
    means = np.nanmean(np.array(paid, dtype=float).reshape(16, 8), axis=1)  # abstentions are left out
    assert found.reward == found.best_of[1] and None in paid
    assert found.reward.value == pytest.approx(np.mean(means))
    # An untrained policy is nearly uniform over 4 letters, ">" and the special tokens that it may draw.
    assert 0.5 * math.log(5) < found.entropy < math.log(12)
    assert 0.02 < found.reward.value < 0.6 and 0 < found.truncated.value <= 1
    chances = [found.best_of[k].value for k in (1, 2, 4)]
    deaths = [found.dead_groups[size].value for size in (2, 4)]
    assert chances == sorted(chances) and deaths == sorted(deaths, reverse=True)
    with pytest.raises(Refused, match="samples of each: give two or more"):
        probe_policy(tiny, rows, Rewards(reward), Sampling(3, 1))
