"""The estimator as a value: presets, refusals, properties, the command line, and no import of torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import tyro

from tokenrl.core import Estimator
from tokenrl.core.choices import AXES
from tokenrl.core.presets import PRESETS
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


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("reinforce", "exact"),
        ("reinforce_running_mean", "exact"),
        ("reinforce_timestep_mean", "exact"),
        ("rloo", "exact"),
        ("grpo", "biased"),
        ("dr_grpo", "exact_up_to_scale"),
        ("ppo_clip", "exact_up_to_scale"),
        ("reinforce_baseline", "exact_up_to_scale"),
        ("rloo_token_mean", "asymptotic"),
        ("loo_std", "exact_per_prompt"),
        ("other_groups_std", "exact_per_prompt"),
        ("remax", "exact"),
        ("opo", "biased"),
        ("opo_loo", "exact"),
        ("optimal", "exact"),
        ("optimal_per_timestep", "exact"),
        ("otb", "biased"),
        ("otb_loo", "exact"),
        ("shrinkage", "exact"),
        ("a2c", "exact"),
        ("ppo", "biased"),
        ("grpo_no_std", "biased"),
        ("grpo_batch_std", "biased"),
        ("dapo", "biased"),
        ("gspo", "biased"),
        ("cispo", "biased"),
        ("reinforce_pp", "asymptotic"),
        ("reinforce_pp_baseline", "asymptotic"),
    ],
)
def test_presets(name, status) -> None:
    e = Estimator.preset(name)
    assert e.bias_status == status and len(e.bias_reason) > 10
    assert e.reference == PRESETS[name].paper != ""
    assert len(PRESETS) == 28
    changed = Estimator.preset(name, epsilon=0.11)
    assert changed == dataclasses.replace(e, epsilon=0.11) and changed.reference == ""


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


def test_status_of_what_depends_on_several_fields() -> None:
    def mine(totals, **_):
        return totals * 0

    table = [
        ({"baseline": mine}, "unknown", "of your own"),
        ({"baseline": mine, "aggregation": "sequence_mean"}, "unknown", "1/length"),
        ({"baseline": mine, "zero_spread": "drop"}, "unknown", "dropped group"),
        ({"returns": "gae", "lam": 1.0}, "exact", "no choice"),
        ({"returns": "gae"}, "biased", "lam < 1"),
        ({"zero_spread": "drop"}, "exact_per_prompt", "kept"),
        ({"zero_spread": "refill"}, "exact_up_to_scale", "P(kept)"),
        ({"zero_spread": "refill", "scale": "loo_std"}, "exact_per_prompt", "kept"),
        ({"zero_spread": "drop", "returns": "reward_to_go"}, "unknown", "before the last action"),
        ({"zero_spread": "drop", "baseline": "shrinkage"}, "biased", "of their own"),
        ({"zero_spread": "drop", "overlong_buffer": 3}, "biased", "of their own"),
        ({"zero_spread": "drop", "scale": "token_whiten"}, "biased", "of their own"),
        ({"scale": "other_groups_std", "aggregation": "token_mean"}, "asymptotic", "other prompts"),
        ({"scale": "loo_std", "aggregation": "token_mean"}, "biased", "in the limit only"),
        ({"entropy_coef": 0.1, "entropy_form": "sequence"}, "exact", "no choice"),
        (
            {"entropy_coef": 0.1, "entropy_form": "sequence", "baseline": "batch_mean"},
            "asymptotic",
            "(N-1)/N as",
        ),
        ({"truncations": "drop"}, "biased", "not truncated"),
        ({"overlong_buffer": 8}, "exact", "no choice"),
    ]
    for fields, status, words in table:
        e = Estimator(**fields)
        assert (e.bias_status, words in e.bias_reason) == (status, True), fields


@pytest.mark.parametrize("axis", AXES)
def test_unknown_names_are_refused_with_the_nearest(axis) -> None:
    name = AXES[axis][-1]
    with pytest.raises(
        Refused, match=f"{axis} was given as .*; it must be one of .*Did you mean '{name}'"
    ) as error:
        Estimator(**{axis: name + "x"})
    assert error.value.exit_code == 2


def test_unknown_presets_and_fields_are_refused() -> None:
    with pytest.raises(Refused, match="Did you mean 'dr_grpo'"):
        Estimator.preset("drgrpo")
    with pytest.raises(Refused, match="Did you mean 'beta'"):
        Estimator.preset("rloo", betta=0.1)
    with pytest.raises(Refused, match="baseline was given as None; it must be one of"):
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


def test_command_line() -> None:
    e = tyro.cli(
        Estimator,
        default=Estimator.preset("grpo"),
        args=["--baseline", "rloo", "--epsilon-high", "0.28", "--running-mean-decay", "None"],
    )
    wanted = {"baseline": "rloo", "epsilon_high": 0.28, "running_mean_decay": None}
    assert e == Estimator.preset("grpo", **wanted)
