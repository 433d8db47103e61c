"""The estimator as a value: presets, refusals, properties, the command line, no torch before its time."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import tyro

from tokenrl.core import Estimator
from tokenrl.core.axes import AXES
from tokenrl.core.baselines import OF_SETS
from tokenrl.core.bias import BUILT
from tokenrl.core.kl import PER_TOKEN
from tokenrl.core.presets import PRESETS
from tokenrl.core.rules import Refused

LATER = [(axis, name) for axis, names in AXES.items() for name in names if name not in BUILT[axis]]


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
        ("rloo", "exact"),
        ("grpo", "biased"),
        ("dr_grpo", "exact_up_to_scale"),
        ("ppo_clip", "exact_up_to_scale"),
    ],
)
def test_presets(name, status) -> None:
    e = Estimator.preset(name)
    assert e.bias_status == status and len(e.bias_reason) > 10
    assert e.reference == PRESETS[name].paper != "" and len(PRESETS[name].note) > 80
    assert name in Estimator.preset.__doc__
    changed = Estimator.preset(name, epsilon=0.11)
    assert changed == dataclasses.replace(e, epsilon=0.11) and changed.reference == ""


def test_preset_fields() -> None:
    grpo = Estimator.preset("grpo")
    assert (grpo.scale, grpo.scale_ddof, grpo.scale_eps, grpo.beta) == ("group_std", 1, 1e-4, 0.0)
    assert (grpo.aggregation, grpo.ratio, grpo.epsilon) == ("sequence_mean", "token", 0.2)
    assert (grpo.kl_estimator, grpo.kl_placement) == ("k3", "loss")
    dr = Estimator.preset("dr_grpo")
    assert (dr.baseline, dr.scale, dr.aggregation) == ("group_mean", "none", "fixed_length")


@pytest.mark.parametrize(("axis", "name"), LATER)
def test_names_of_what_is_not_built_are_known_and_refused(axis, name) -> None:
    with pytest.raises(Refused, match=r"not built yet\. Built are: ") as error:
        Estimator(**{axis: name})
    assert all(built in str(error.value) for built in BUILT[axis])


def test_every_built_name_is_on_its_axis_and_has_code() -> None:
    for axis, names in BUILT.items():
        assert set(names) <= set(AXES[axis])
        for name in names:
            Estimator(**{axis: name})
    assert len(LATER) >= 20
    assert set(OF_SETS) == set(BUILT["baseline"]) - {"none", "constant", "running_mean"}
    assert set(PER_TOKEN) == set(BUILT["kl_estimator"])


@pytest.mark.parametrize("axis", AXES)
def test_unknown_names_are_refused_with_the_nearest(axis) -> None:
    name = BUILT[axis][-1]
    with pytest.raises(Refused, match=f"Allowed are: .*Did you mean '{name}'") as error:
        Estimator(**{axis: name + "x"})
    assert error.value.exit_code == 2


def test_unknown_presets_and_fields_are_refused() -> None:
    with pytest.raises(Refused, match="Did you mean 'dr_grpo'"):
        Estimator.preset("drgrpo")
    with pytest.raises(Refused, match="Did you mean 'beta'"):
        Estimator.preset("rloo", betta=0.1)
    with pytest.raises(Refused, match="unknown"):
        Estimator(baseline=None)


@pytest.mark.parametrize(
    "field",
    [
        {"beta": -0.1}, {"beta": float("nan")}, {"beta": "0.1"}, {"beta": True},
        {"gamma": 0.0}, {"gamma": 1.01}, {"scale_eps": -1e-9}, {"scale_eps": float("inf")}, {"scale_ddof": 2},
        {"epsilon": 0.0}, {"epsilon": 1.5}, {"epsilon_high": 0.0}, {"entropy_coef": -1.0},
        {"running_mean_decay": 1.0}, {"running_mean_decay": -0.1},
        {"baseline_constant": float("nan")}, {"running_mean_init": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_out_of_range_are_refused(field) -> None:
    with pytest.raises(Refused, match=next(iter(field)) + ".*must be"):
        Estimator(**field)


def test_numbers_at_the_edge_are_allowed() -> None:
    e = Estimator(beta=0, gamma=1, scale_eps=0.0, epsilon_high=5.0, running_mean_decay=None, epsilon=1.0)
    assert e.epsilon_high == 5.0 and e.running_mean_decay is None


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
    for grouped in ({}, {"baseline": "group_mean"}, {"baseline": "none", "scale": "group_std"}):
        assert Estimator(**grouped).needs_groups
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
