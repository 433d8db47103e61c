"""What `tokenrl lab exact` says of a configuration of TRL and of one preset."""

from __future__ import annotations

import json
import re

import pytest
from command_line import completes

from tokenrl import Estimator
from tokenrl.lab import measure_bias

CASES = [  # fields of a file, the estimator, and words of what no axis expresses
    ({"learning_rate": 1e-6, "min_p": None}, "trl_grpo", []),
    ({"trainer": "rloo", "epsilon": 0.1}, "trl_rloo", ["TRL clips the ratio of the sequence"]),
    (
        {"normalize_advantages": True, "beta": 0, "mask_truncated_completions": True},
        "trl_rloo,scale=batch_std,beta=0,truncations=mask",
        ["deviation of the advantages", "lacks it"],
    ),
    (
        {"loss_type": "grpo", "delta": 3.0},
        "trl_grpo,aggregation=sequence_mean,dual_clip=3",
        [],
    ),
    (
        {"loss_type": "dr_grpo", "scale_rewards": False},
        "trl_grpo,aggregation=fixed_length,scale=none",
        ["is another field: scale_rewards"],
    ),
    (
        {"loss_type": "bnpo", "num_iterations": 2, "temperature": 1.0},
        "trl_grpo",
        ["one pass on one device", "for several updates"],
    ),
    (
        {"loss_type": "cispo", "epsilon_high": 0.5, "beta": 0.3, "entropy_coef": 0.01},
        "trl_grpo,ratio=none,epsilon_high=0.5,beta=0.3,entropy_coef=0.01",
        ["At 1 or less it multiplies", "the gradient of k2", "TRL averages the entropy"],
    ),
    (  # of two fields that set one axis the later counts
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "scale_rewards": "batch"},
        "trl_grpo,ratio=sequence_mean,aggregation=sequence_sum,scale=batch_std",
        ["the same gradient"],
    ),
    (
        {"importance_sampling_level": "sequence", "loss_type": "sapo"},
        "trl_grpo,ratio=none,aggregation=sequence_mean",
        ["the same gradient", "After the first update SAPO's gate"],
    ),
    ({"beta": 0.1, "use_bias_correction_kl": False}, "trl_grpo,beta=0.1,kl_estimator=k3", ["k3"]),
    (
        {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
        "trl_grpo,components=separate",
        ["GDPO"],
    ),
]


def words(out: str) -> str:
    return " ".join(re.sub("[─━]", "", out).split())


@pytest.fixture(scope="module")
def verdict():
    return measure_bias("rloo")


@pytest.fixture
def measured(monkeypatch, verdict):
    """The estimators that are measured, in place of their measurement, which takes seconds."""
    estimators = []
    monkeypatch.setattr(
        "tokenrl.lab.exact.report.measure_bias", lambda e: (estimators.append(e), verdict)[1]
    )
    return estimators


@pytest.mark.parametrize(("fields", "name", "remarks"), CASES)
def test_a_configuration_of_trl_is_an_estimator(
    fields, name, remarks, measured, capsys, tmp_path
) -> None:
    path = tmp_path / "grpo.json"
    path.write_text(json.dumps(fields))
    completes("lab exact --trl-config", str(path))
    assert measured == [Estimator.preset(name), Estimator()]
    out = words(capsys.readouterr().out)
    assert [remark for remark in remarks if remark not in out] == []
    assert ("beyond the axes" in out) == bool(remarks)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "loss_type: grp", "Did you mean 'grpo'"),
        ("a.yaml", "losstype: grpo", "Did you mean 'loss_type'"),
        (
            "a.yaml",
            "reward_clip_range: [0, 1]\nloss_type: grpo",
            "a RLOOConfig of TRL 1.16.0, which it is read as, has no field loss_type",
        ),
        ("a.yaml", "trainer: gkd\nbeta: 1", "one of grpo, rloo"),
        ("a.yaml", "teacher_model_name_or_path: a\nbeta: 1", "has no field teacher_model_name"),
        ("a.yaml", "epsilon: 0.2.8", "epsilon was given as '0.2.8'"),
        ("a.json", "[1]", "a.json"),
    ],
)
def test_what_is_no_configuration_is_refused(
    name, text, message, measured, refusal, tmp_path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert message in refusal("lab exact --trl-config", str(path)) and measured == []


def test_the_table_has_the_defaults_of_trl(measured, capsys, tmp_path):
    trl = pytest.importorskip("trl")
    for kind, name in ((trl.GRPOConfig, "trl_grpo"), (trl.RLOOConfig, "trl_rloo")):
        path = tmp_path / "exported.json"
        path.write_text(kind(output_dir=str(tmp_path), bf16=False, use_cpu=True).to_json_string())
        completes("lab exact --trl-config", str(path))
        out = words(capsys.readouterr().out)
        assert measured[-2] == Estimator.preset(name)
        assert "beyond" not in out  # no field differs from its default


def test_a_preset_is_explained_beside_rloo(capsys, refusal):
    completes("lab exact --preset unsloth")
    out = words(capsys.readouterr().out)
    for part in (
        "Unsloth 2026.10.9",
        "estimator trl_grpo",
        "gradient biased",
        "(asymptotic)",
        "unsloth_zoo",
    ):
        assert part in out
    (row,) = re.findall(r"unsloth biased biased ([0-9.]+)", out)
    assert float(row) == pytest.approx(measure_bias("trl_grpo").cosine, abs=1e-6)
    exact = ["lab", "exact", "--preset"]
    assert "exclude each other" in refusal(*exact, "grpo", "--estimators", "rloo")
    assert "Did you mean 'grpo'" in refusal(*exact, "grpoo")
