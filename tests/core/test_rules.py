"""The rules that refuse or flag a setting: exactly where each begins and ends."""

from __future__ import annotations

import math

import pytest

from tokenrl.core import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.core.rules import (
    check_head,
    check_horizon,
    entropy_collapse_message,
    entropy_collapsed,
    subtracts_something,
)
from tokenrl.errors import Refused

NONE = Estimator(baseline="none", returns="reward_to_go")
WITHOUT = [
    NONE,
    Estimator(baseline="constant", baseline_constant=0.0),
    Estimator(baseline="none", returns="gae"),
    Estimator(baseline="none", scale="batch_std"),
]
WITH = [
    Estimator(),
    Estimator(baseline="constant", baseline_constant=-0.5),
    Estimator(baseline="running_mean"),
    Estimator(baseline="value", returns="gae"),
    Estimator(baseline="none", scale="token_whiten"),
    Estimator(baseline=lambda totals, **_: totals * 0),
]


@pytest.mark.parametrize("estimator", WITHOUT, ids=str)
def test_without_a_baseline_500_steps_are_the_limit(estimator):
    check_horizon(estimator, 500)
    check_horizon(estimator, 501, allow_no_baseline=True)
    for horizon in (501, None):
        with pytest.raises(Refused, match="--allow-no-baseline"):
            check_horizon(estimator, horizon)
    assert not subtracts_something(estimator)


@pytest.mark.parametrize(
    "estimator", WITH, ids=lambda e: f"{getattr(e.baseline, '__name__', e.baseline)}-{e.scale}"
)
def test_with_a_baseline_there_is_no_limit(estimator):
    check_horizon(estimator, 10**6)
    check_horizon(estimator, None)
    assert subtracts_something(estimator)


def test_plain_reinforce_is_the_only_preset_without_a_baseline():
    assert [name for name in PRESETS if not subtracts_something(Estimator.preset(name))] == ["reinforce"]


def test_the_refusal_says_what_was_given_and_how_to_mend_it():
    with pytest.raises(Refused) as refusal:
        check_horizon(NONE, 1600)
    assert all(word in str(refusal.value) for word in ("1,600", "'none'", "running_mean", "reward_to_go"))
    assert refusal.value.exit_code == 2 and "\n" not in str(refusal.value)


@pytest.mark.parametrize("head, discrete", [("softmax", False), ("gaussian", True)])
def test_a_head_that_cannot_give_the_actions_is_refused(head, discrete):
    with pytest.raises(Refused, match=f"'{head}'"):
        check_head(head, discrete)
    check_head(head, not discrete)
    check_head("auto", discrete)
    with pytest.raises(Refused, match="Did you mean 'softmax'"):
        check_head("softmaxx", discrete)


@pytest.mark.parametrize(
    "coefficient, entropy, flagged",
    [(0, 0.0999, True), (0, 0.1, False), (0, 0.0, True), (0.001, 0.0, False), (0, math.nan, False)],
)
def test_entropy_collapse(coefficient, entropy, flagged):
    assert entropy_collapsed(coefficient, entropy) is flagged
    assert f"{entropy:.3g} nats" in entropy_collapse_message(entropy)
