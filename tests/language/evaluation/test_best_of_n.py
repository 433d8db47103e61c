"""Best-of-n against enumeration: every subset, every tuple of draws, and the texts of a pool."""

import itertools

import numpy as np
import pytest
from refusals import refused
from tiny_models import PROMPTS, make_policy

from tokenrl.language.evaluation.best_of_n import (
    best_of_n_kl,
    best_of_n_metrics,
    choice_weights,
    sample_pool,
)
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.sampling import Sampling

PROXY = np.array([0.3, -1.0, 2.0, 0.3, 2.0, 2.0, 0.7])  # with ties
GOLD = np.array([1.0, 0.0, -3.0, 5.0, 2.0, 0.5, 4.0])


def value_of_choice(rows):
    """Mean gold reward of the rows with the highest proxy reward."""
    rows = list(rows)
    return np.mean([GOLD[i] for i in rows if PROXY[i] == PROXY[rows].max()])


@pytest.mark.parametrize("n", range(1, 8))
def test_the_estimate_is_the_mean_over_all_subsets(n):
    subsets = list(itertools.combinations(range(7), n))
    expected = np.mean([value_of_choice(subset) for subset in subsets])
    weights = choice_weights(PROXY, n)
    for outside in (0, 8):
        with refused("there are 7"):
            choice_weights(PROXY, outside)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert weights @ GOLD == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_kl_is_that_of_the_enumerated_choice(n):
    chosen = np.zeros(7)
    for draws in itertools.product(range(7), repeat=n):
        best = [i for i in draws if PROXY[i] == PROXY[list(draws)].max()]
        for i in best:
            chosen[i] += 7.0**-n / len(best)
    expected = (chosen[chosen > 0] * np.log(7 * chosen[chosen > 0])).sum()
    assert best_of_n_kl(PROXY, n) == pytest.approx(expected, abs=1e-12)


def length(completions, **_):
    """The reward that chooses: longer is better."""
    return [float(len(text)) for text in completions]


def vowels(completions, **_):
    """The reward that measures; it abstains from some texts."""
    return [
        None if text.startswith("q") else float(sum(c in "aeiou" for c in text))
        for text in completions
    ]


def test_the_metrics_are_those_of_the_pool_that_was_sampled():
    policy, rows = make_policy(initializer_range=0.5), [{"prompt": prompt} for prompt in PROMPTS]
    sampling = Sampling(5, num_generations=6, seed=3)
    metrics = best_of_n_metrics(policy, rows, Rewards(length), Rewards(vowels), sampling)
    pool = sample_pool(policy, PROMPTS, sampling)  # the same stream of random numbers
    kept = [[text for text in texts if not text.startswith("q")] for texts in pool]
    names = ("best_of_n", "best_of_n_proxy", "best_of_n_kl")
    assert {name.partition("@")[2].partition("_")[0] for name in metrics} == {"1", "2", "4", "6"}
    for n in (1, 2, 4, 6):
        values = []
        for texts in (texts for texts in kept if len(texts) >= n):
            chooses, measures = np.array(length(texts)), np.array(vowels(texts))
            weights = choice_weights(chooses, n)
            values.append((weights @ measures, weights @ chooses, best_of_n_kl(chooses, n)))
        means, errors = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
        assert [metrics[f"{name}@{n}"] for name in names] == pytest.approx(means, abs=1e-12)
        error = errors[0] / len(values) ** 0.5
        assert metrics[f"best_of_n@{n}_stderr"] == pytest.approx(error)
    assert metrics["best_of_n_proxy@1"] < metrics["best_of_n_proxy@6"]
