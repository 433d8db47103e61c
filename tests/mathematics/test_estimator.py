"""The estimator as a value: presets, refusals, properties, the command line, and no import of torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import tyro

from tokenrl.core import Estimator
from tokenrl.core.baselines import check_horizon
from tokenrl.core.choices import AXES
from tokenrl.core.presets import PRESETS, preset_name
from tokenrl.errors import Refused


def test_importing_the_estimator_imports_no_torch() -> None:
    code = (
        "import sys; from tokenrl.core import Estimator; e = Estimator.preset('grpo'); e.bias_reason;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'jaxtyping', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_the_recommended_estimator() -> None:
    e = Estimator()
    assert e == Estimator.preset("rloo")
    assert (e.baseline, e.aggregation, e.kl_placement, e.kl_estimator) == (
        "rloo",
        "sequence_sum",
        "reward",
        "k1",
    )
    assert e.bias_status == Estimator(beta=0.1).bias_status == "exact"


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name) -> None:
    e = Estimator.preset(name)
    assert len(PRESETS) == 28 and e.reference == PRESETS[name].paper != "" and preset_name(e) == name
    changed = Estimator.preset(name, epsilon=0.11)
    assert changed == dataclasses.replace(e, epsilon=0.11)
    assert (changed.reference, preset_name(changed)) == ("", "custom estimator")


def test_preset_fields() -> None:
    grpo = Estimator.preset("grpo")
    assert (grpo.scale, grpo.scale_ddof, grpo.scale_eps, grpo.beta) == ("group_std", 1, 1e-4, 0.0)
    assert (grpo.aggregation, grpo.ratio, grpo.epsilon) == ("sequence_mean", "token", 0.2)
    assert (grpo.kl_estimator, grpo.kl_placement) == ("k3", "loss")
    dr = Estimator.preset("dr_grpo")
    assert (dr.baseline, dr.scale, dr.aggregation) == ("group_mean", "none", "fixed_length")


def test_choices_that_exclude_each_other_are_refused() -> None:
    for kind in ("full_path", "k2_sequence"):
        with pytest.raises(Refused, match="Set kl_placement 'loss'"):
            Estimator(beta=0.1, kl_estimator=kind)
    for fields in ({"baseline": "episode_mean"}, {"scale": "episode_std"}):
        with pytest.raises(Refused, match="reward_to_go"):
            Estimator(**fields)
    for baseline in ("rloo", "running_mean", "remax", "batch_mean"):
        with pytest.raises(Refused, match=r"in other units.*the baseline 'none' or 'value'"):
            Estimator(baseline=baseline, returns="episode_normalized")


@pytest.mark.parametrize("axis", AXES)
def test_unknown_names_are_refused_with_the_nearest(axis) -> None:
    name = AXES[axis][-1]
    words = f"{axis} was given as '{name}x'. Did you mean '{name}'. It must be one of "
    with pytest.raises(Refused, match=words) as error:
        Estimator(**{axis: name + "x"})
    assert error.value.exit_code == 2


def test_unknown_presets_and_fields_are_refused() -> None:
    with pytest.raises(Refused, match="Did you mean 'dr_grpo'"):
        Estimator.preset("drgrpo")
    with pytest.raises(Refused, match="Did you mean 'beta'"):
        Estimator.preset("rloo", betta=0.1)
    with pytest.raises(Refused, match=r"baseline was given as None.*It must be one of"):
        Estimator(baseline=None)


@pytest.mark.parametrize(
    "field",
    [
        {"beta": -0.1}, {"beta": float("nan")}, {"beta": "0.1"}, {"beta": True},
        {"gamma": 0.0}, {"gamma": 1.01}, {"scale_eps": -1e-9}, {"scale_eps": float("inf")}, {"scale_ddof": 2},
        {"epsilon": 0.0}, {"epsilon": 1.5}, {"epsilon_high": 0.0}, {"entropy_coef": -1.0},
        {"running_mean_decay": 1.0}, {"running_mean_decay": -0.1},
        {"baseline_constant": float("nan")}, {"running_mean_init": float("inf")},
        {"shrinkage_weight": 1.1}, {"dual_clip": 1.0}, {"importance_cap": 0.9}, {"lam": 1.01}, {"lam": None},
        {"value_clip": 0.0}, {"window": 0}, {"window": 1.5}, {"overlong_buffer": -1}, {"window": True},
        {"leave_one_out": 1},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_out_of_range_are_refused(field) -> None:
    with pytest.raises(Refused, match=next(iter(field)) + ".*must be"):
        Estimator(**field)


def test_numbers_at_the_edge_are_allowed() -> None:
    e = Estimator(
        beta=0,
        gamma=1,
        scale_eps=0.0,
        epsilon_high=5.0,
        running_mean_decay=None,
        epsilon=1.0,
        lam=0,
        window=1,
    )
    assert (e.gamma, e.epsilon_high, e.lam) == (1, 5.0, 0)


def test_needs() -> None:
    plain = Estimator(baseline="none")
    assert not any(
        (
            plain.needs_groups,
            plain.needs_kl,
            plain.needs_reference,
            plain.needs_entropy,
            plain.loss_side_terms,
        )
    )
    assert not plain.needs_old_logprobs and Estimator(ratio="token").needs_old_logprobs
    inputs = ("values", "greedy", "score_norms", "sampling_logprobs")
    for fields, wanted in (
        ({}, ()),
        ({"baseline": "value"}, ("values",)),
        ({"returns": "gae"}, ("values",)),
        ({"baseline": "remax"}, ("greedy",)),
        ({"baseline": "optimal"}, ("score_norms",)),
        ({"importance_cap": 2.0}, ("sampling_logprobs",)),
    ):
        assert tuple(name for name in inputs if getattr(Estimator(**fields), f"needs_{name}")) == wanted
    for grouped in ({}, {"baseline": "group_mean"}, {"baseline": "none", "scale": "group_std"}):
        assert Estimator(**grouped).needs_groups
    for name in ("remax", "value", "timestep_mean", "episode_mean"):
        assert not Estimator(baseline=name, returns="reward_to_go").needs_groups
    assert Estimator(baseline="none", zero_spread="drop").needs_groups
    assert not Estimator(baseline="batch_mean", scale="batch_std").needs_groups
    assert Estimator(beta=0.1).needs_reference and not Estimator(beta=0.1).loss_side_terms
    assert Estimator(beta=0.1, kl_placement="loss").loss_side_terms
    assert not Estimator(kl_placement="loss").loss_side_terms
    assert Estimator(entropy_coef=0.1).needs_entropy and Estimator(entropy_coef=0.1).loss_side_terms


def test_command_line(capsys) -> None:
    e = tyro.cli(
        Estimator,
        default=Estimator.preset("grpo"),
        args=["--baseline", "rloo", "--epsilon-high", "0.28", "--running-mean-decay", "None"],
    )
    wanted = {"baseline": "rloo", "epsilon_high": 0.28, "running_mean_decay": None}
    assert e == Estimator.preset("grpo", **wanted)
    with pytest.raises(SystemExit):
        tyro.cli(Estimator, args=["--help"])
    printed = capsys.readouterr().out
    assert [name for names in AXES.values() for name in names if name not in printed] == []


TO_GO = {"baseline": "none", "returns": "reward_to_go"}
NO_BASELINE = (
    *(TO_GO, {"baseline": "constant"}, {"baseline": "none", "returns": "gae"}),
    {"baseline": "none", "scale": "batch_std"},
)
WITH_BASELINE = (
    *({}, {"baseline": "constant", "baseline_constant": -0.5}, {"baseline": "value", "returns": "gae"}),
    *({"baseline": "none", "scale": "token_whiten"}, {"baseline": "none", "returns": "episode_normalized"}),
    {"baseline": lambda totals, **_: totals * 0},
)


def test_without_a_baseline_500_steps_are_the_limit() -> None:
    for fields in NO_BASELINE:
        e = Estimator(**fields)
        assert not e.subtracts_baseline
        check_horizon(e, 500)
        check_horizon(e, 501, allow_no_baseline=True)
        for horizon, words in ((1600, "up to 1,600 steps"), (None, "without limit")):
            with pytest.raises(Refused, match=f"{words}.*'running_mean'.*--allow-no-baseline") as error:
                check_horizon(e, horizon)
            assert error.value.exit_code == 2
    for fields in WITH_BASELINE:
        assert Estimator(**fields).subtracts_baseline
        check_horizon(Estimator(**fields), None)
    assert [name for name in PRESETS if not Estimator.preset(name).subtracts_baseline] == ["reinforce"]
