"""The baseline of a language task: groups where there are some, else what the spread of rewards says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tokenrl.advisor.language import fitted
from tokenrl.advisor.language_baseline import reward_noise, why_scale, with_baseline
from tokenrl.cli import main
from tokenrl.core import Estimator
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.probe import Estimate, Probe, spread
from tokenrl.language.training.setup import resolve

SURE = Estimate(0.25, 0.01)
DEAD = {size: Estimate(0.3, 0.01) for size in (2, 4, 8)}
FOUND = Probe(64, 8, True, SURE, {1: SURE}, DEAD, Estimate(0.0, 0.01), 7.0, 8, 0.5, within=0.1, between=0.06)


def test_the_spread_is_split_without_bias():
    """Prompts with success rates 0.2 and 0.8 and four samples each, averaged over every outcome."""
    rates, within, between = (0.2, 0.8), 0.0, 0.0
    for outcome in np.ndindex(*[2] * 8):
        chance = np.prod(
            [
                [p if x else 1 - p for x in row]
                for p, row in zip(rates, np.reshape(outcome, (2, 4)), strict=True)
            ]
        )
        means = np.reshape(outcome, (2, 4)).mean(1)
        found = spread(list(np.reshape(outcome, (2, 4)).astype(float)))
        within += chance * found["within"]
        unclipped = means.var(ddof=1) - found["within"] / 4
        assert found["between"] == pytest.approx(max(0.0, unclipped))
        between += chance * unclipped
    assert within == pytest.approx(0.16)  # p (1 - p) of each
    assert between == pytest.approx(np.var(rates, ddof=1))


def test_a_single_prompt_or_sample_tells_less():
    assert np.isnan(spread([np.array([1.0])])["within"])
    one = spread([np.array([1.0, 0.0])])
    assert one["within"] == 0.5 and np.isnan(one["between"])


def test_the_noise_of_rewards():
    found = reward_noise(FOUND, 4)
    assert found == pytest.approx({"none": 0.16 + 0.0625, "running_mean": 0.16, "rloo": 0.1 * 4 / 3})
    assert "rloo" not in reward_noise(FOUND, 1)


@pytest.mark.parametrize(
    ("size", "within", "between", "asked", "baseline", "words"),
    [
        (8, 0.1, 0.06, None, "rloo", "mean of the prompt's other rewards"),
        (4, 0.1, 0.0, None, "rloo", "mean of the prompt's other rewards"),  # prompts will differ later on
        (2, 0.1, 0.06, None, "running_mean", "groups are small"),  # 0.16 against 0.2
        (2, 0.1, 0.2, None, "rloo", "mean of the prompt's other rewards"),  # 0.3 against 0.2
        (1, 0.1, 0.06, None, "running_mean", "one completion per prompt"),
        (1, 0.1, 0.06, "none", "none", "as you asked; plain REINFORCE"),
    ],
)
def test_the_baseline_follows_from_group_and_spread(size, within, between, asked, baseline, words):
    probe = replace(FOUND, within=within, between=between)
    found, why = with_baseline(Estimator(baseline=asked or "rloo"), probe, size, asked)
    assert found.baseline == baseline and words in why and "none 0." in why
    assert found.running_mean_init == (0.25 if baseline == "running_mean" else 0.0)


def test_none_is_named_where_rewards_lie_around_0():
    centred = replace(FOUND, reward=Estimate(0.01, 0.01))
    assert "none would do no harm" in with_baseline(Estimator(), centred, 4, None)[1]
    assert "none would do no harm" not in with_baseline(Estimator(), FOUND, 4, None)[1]


def test_every_divisor_is_named_with_its_bias():
    said = why_scale()
    for words in ("group_std is biased", "loo_std is exact per prompt", "token_whiten is asymptotic"):
        assert words in said


def test_a_group_size_that_was_asked_for_is_kept():
    train = resolve(TrainArguments(prompts_per_step=16, max_completion_length=8), task=None)
    found, settings = fitted(train, FOUND, None, reward_model=False, size=1)
    assert (found.num_generations, found.prompts_per_step) == (1, 128)
    assert found.estimator.baseline == "running_mean" and not found.estimator.needs_groups
    reasons = {setting.name: setting.reason for setting in settings}
    assert reasons["num_generations"] == "as you asked" and "gradient exact" in reasons["estimator.baseline"]


def test_one_completion_per_prompt_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    few = ["--task", "vowels", "--num-prompts", "8", "--num-samples", "2", "--num-generations", "1"]
    assert main(["advise", *few, "--json", "a.json", "--config", "c.json"]) == 0
    advice = json.loads((tmp_path / "a.json").read_text())
    assert advice["arguments"]["estimator"]["baseline"] == "running_mean"
    assert advice["measurements"]["probe"]["within"] > 0
    assert main(["train", "--config", "c.json", "--eval-generations", "0", "--check", "--quiet"]) == 0
    assert main(["advise", *few, "--baseline", "rloo"]) == 2
    assert "num_generations=1" in capsys.readouterr().err
