"""The guards that refuse a setting: exactly where each begins and ends."""

from __future__ import annotations

import pytest

from tokenrl.core import Estimator
from tokenrl.core.baselines import check_horizon
from tokenrl.core.presets import PRESETS
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
    Estimator(baseline="none", returns="episode_normalized"),
    Estimator(baseline=lambda totals, **_: totals * 0),
]


@pytest.mark.parametrize("estimator", WITHOUT, ids=str)
def test_without_a_baseline_500_steps_are_the_limit(estimator):
    check_horizon(estimator, 500)
    check_horizon(estimator, 501, allow_no_baseline=True)
    for horizon in (501, None):
        with pytest.raises(Refused, match="--allow-no-baseline"):
            check_horizon(estimator, horizon)
    assert not estimator.subtracts_baseline


@pytest.mark.parametrize(
    "estimator", WITH, ids=lambda e: f"{getattr(e.baseline, '__name__', e.baseline)}-{e.scale}-{e.returns}"
)
def test_with_a_baseline_there_is_no_limit(estimator):
    check_horizon(estimator, 10**6)
    check_horizon(estimator, None)
    assert estimator.subtracts_baseline


def test_plain_reinforce_is_the_only_preset_without_a_baseline():
    assert [name for name in PRESETS if not Estimator.preset(name).subtracts_baseline] == ["reinforce"]


def test_the_refusal_says_what_was_given_and_how_to_mend_it():
    with pytest.raises(Refused) as refusal:
        check_horizon(NONE, 1600)
    assert all(word in str(refusal.value) for word in ("1,600", "'none'", "running_mean", "reward_to_go"))
    assert refusal.value.exit_code == 2 and "\n" not in str(refusal.value)
