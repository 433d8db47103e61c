"""Whether a reward rises, by evaluations with errors or by quarters of the steps."""

from __future__ import annotations

import numpy as np
import pytest

from tokenrl.advisor.diagnosis import advise_run
from tokenrl.advisor.history import read_run
from tokenrl.advisor.progress import quarters, read_progress


@pytest.mark.parametrize(
    ("evaluated", "gained", "fell"),
    [
        ({0: 0.5, 40: 0.6}, True, False),  # 7 standard errors of the difference
        ({0: 0.5, 40: 0.52}, False, False),  # 1.4
        ({0: 0.5, 20: 0.9, 40: 0.6}, True, True),
        ({0: 0.5, 40: 0.4}, False, True),
        ({0: 0.50, 40: 0.53}, True, False),  # 2.1: enough for one comparison
        ({0: 0.50, 10: 0.52, 20: 0.52, 30: 0.52, 40: 0.53}, False, False),  # and too little for four
    ],
)
def test_evaluations_differ_if_chance_would_not_explain_it(made_up, evaluated, gained, fell):
    progress = read_progress(read_run(str(made_up("train", evaluated=evaluated))))
    assert (progress.gained, progress.fell, progress.held_out) == (gained, fell, True)


@pytest.mark.parametrize(("slope", "trend"), [(0.05, "rising"), (0.0, "flat"), (-0.05, "falling")])
def test_the_trend_is_that_of_the_second_half(made_up, slope, trend):
    noise = np.random.default_rng(0).normal(0, 0.1, 41)
    path = made_up("train", reward=lambda step: (0 if step <= 20 else slope * (step - 20)) + noise[step])
    assert read_progress(read_run(str(path))).trend == trend


def test_without_evaluations_quarters_of_the_steps_are_compared(made_up):
    history = read_run(str(made_up("control", evaluated={0: 1.0})))  # one evaluation compares with nothing
    parts = quarters(history)
    assert [part.steps for part in parts] == [(1, 10), (11, 20), (21, 30), (31, 40)]
    rewards = np.array(history.series("reward")[1]).reshape(4, 10)
    assert [part.value for part in parts] == pytest.approx(rewards.mean(1))
    assert [part.error for part in parts] == pytest.approx(rewards.std(1, ddof=1) / 10**0.5)
    progress = read_progress(history)
    assert (progress.gained, progress.fell, progress.held_out) == (True, False, False)


def test_pure_noise_seldom_counts_as_progress(made_up):
    """Five false alarms in a hundred are allowed for; 40 runs of noise have two on average."""
    alarms = 0
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(0, 0.01, 41)
        evaluated = {step: float(noise[step]) for step in range(0, 41, 8)}
        progress = read_progress(read_run(str(made_up("train", evaluated=evaluated))))
        alarms += progress.gained
    assert alarms <= 5


@pytest.mark.parametrize(("steps", "trend"), [(1, "not known yet"), (9, "not known yet"), (10, "rising")])
def test_too_few_steps_are_not_compared(made_up, steps, trend):
    path = str(made_up("train", steps=steps, evaluated={0: 0.1}))
    progress = read_progress(read_run(path))
    assert (progress.trend, progress.gained, progress.fell) == (trend, steps == 10, False)
    finding = advise_run(path).findings[0]
    assert (finding.verdict == "watch") and ("too few steps to compare" in finding.text) == (steps < 10)
