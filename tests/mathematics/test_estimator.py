"""The estimator as a value: presets, refusals, properties, the command line, and no import of torch."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import typing

import pytest
from refusals import refused

from tokenrl.core import Estimator
from tokenrl.core.choices import CHOICES, OBJECTIVES
from tokenrl.core.effects import KL_EFFECTS
from tokenrl.core.presets import PRESETS
from tokenrl.core.refusals import check_horizon


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    e = Estimator.preset(name)
    first = {"unsloth": "trl_grpo"}.get(name, name)  # of equal presets the first has the name
    assert (
        len(PRESETS) >= 39 and e.preset_name == first and e.reference == PRESETS[first].paper != ""
    )
    # those of toolkits stand last
    assert (PRESETS[name].beyond != "") == (name in list(PRESETS)[-12:])
    changed = Estimator.preset(name, epsilon=0.11)
    assert changed == dataclasses.replace(e, epsilon=0.11)
    assert (changed.reference, changed.preset_name) == ("", "custom estimator")


def test_entries_are_those_of_the_fields_also_of_copies():
    e = Estimator(scale="group_std", beta=0.1)
    assert vars(e).keys() == {field.name for field in dataclasses.fields(e)}
    for same in (pickle.loads(pickle.dumps(e)), copy.deepcopy(e), Estimator(**vars(e))):
        assert same == e and same.entries == e.entries
    assert e.entries["scale"] == CHOICES["scale"]["group_std"]
    changed = dataclasses.replace(e, scale="none", beta=0)
    assert changed.entries["scale"] == CHOICES["scale"]["none"] and "kl" not in changed.entries


IN_LOSS = {"beta": 0.1, "kl_placement": "loss"}
TO_GO, SEPARATE = {"returns": "reward_to_go"}, {"components": "separate"}
NORMALISED = {"returns": "episode_normalized"}
OF_SEQUENCES = ("full_path", "k2_sequence", "closed_form", "closed_form_path")
EXCLUDED = {
    "Set kl_placement 'loss'": [{"beta": 0.1, "kl_estimator": kind} for kind in OF_SEQUENCES],
    "kl_baseline 'none'": [
        {"kl_baseline": "closed_form"} | fields
        for fields in ({"beta": 0.1}, IN_LOSS, IN_LOSS | {"kl_estimator": "closed_form"})
    ],
    "reward_to_go": [
        {"baseline": "episode_mean"},
        {"scale": "episode_std"},
        {"baseline": "episode_mean", **TO_GO, **SEPARATE},
        {"scale": "episode_std", **TO_GO, **SEPARATE},
        {"baseline": "none", **NORMALISED, **SEPARATE},
    ],
    r"in other units.*the baseline 'none' or 'value'": [
        {"baseline": name, **NORMALISED} for name in ("rloo", "running_mean", "remax", "batch_mean")
    ],
    r"baseline was given as None.*It must be one of": [{"baseline": None}],
}


def test_choices_that_exclude_each_other_or_name_nothing_are_refused():
    for words, cases in EXCLUDED.items():
        for fields in cases:
            with refused(words):
                Estimator(**fields)
    with refused("The estimator 'grpo,scale' cannot be used: write 'scale' as NAME=VAL"):
        Estimator.preset("grpo,scale")


def test_defaults_and_fields_of_presets():
    """RLOO is the default; what papers fix is written out, whatever table the presets come from."""
    assert (
        Estimator() == Estimator.preset("rloo") == Estimator(beta=0.0, gamma=1, lam=0.95, window=16)
    )
    e = Estimator()
    assert (e.baseline, e.aggregation, e.kl_placement, e.kl_estimator) == (
        "rloo",
        "sequence_sum",
        "reward",
        "k1",
    )
    clip, std = (
        {"ratio": "token", "epsilon": 0.2},
        {"scale": "group_std", "scale_ddof": 1, "scale_eps": 1e-4},
    )
    loss = {"kl_estimator": "k3", "kl_placement": "loss", "aggregation": "sequence_mean"}
    assert Estimator.preset("grpo") == Estimator("group_mean", **std, **clip, **loss)
    assert Estimator.preset("dr_grpo") == Estimator(
        "group_mean", aggregation="fixed_length", **clip
    )


@pytest.mark.parametrize(
    ("fields", "subtracts"),
    [
        ({"baseline": "none", "returns": "reward_to_go"}, False),
        ({"baseline": "constant"}, False),
        ({}, True),
        ({"baseline": "constant", "baseline_constant": -0.5}, True),
        ({"baseline": "none", "scale": "token_whiten"}, True),
    ],
)
def test_without_a_baseline_500_steps_are_the_limit(fields, subtracts):
    e = Estimator(**fields)
    assert e.subtracts_baseline == subtracts
    check_horizon(e, 500)
    check_horizon(e, 501, allow_no_baseline=True)
    for horizon, words in ((1600, "up to 1,600 steps"), (None, "without limit")):
        if subtracts:
            check_horizon(e, horizon)
            continue
        with refused(f"{words}.*'running_mean'.*--allow-no-baseline"):
            check_horizon(e, horizon)


def test_the_types_of_the_fields_name_the_choices_of_the_tables():
    hints = typing.get_type_hints(Estimator)
    tables = dict(CHOICES)
    tables["objective"], tables["objective_form"] = zip(*OBJECTIVES, strict=True)
    tables["kl_placement"], tables["kl_estimator"] = zip(*KL_EFFECTS, strict=True)
    for axis, names in tables.items():
        assert {*typing.get_args(hints[axis])} == {*names}
