"""What `tokenrl lab exact` says of a configuration of TRL and of one preset."""

from __future__ import annotations

import json
import re

import pytest

from tokenrl import Estimator
from tokenrl.cli import main
from tokenrl.lab import measure_bias

GROUP_OF_TWO = {"num_generations": 2, "scale_rewards": True}
SEVERAL = {"num_iterations": 2}
CASES = [
    ({"learning_rate": 1e-6, "num_generations": 8}, "trl_grpo", []),
    (
        {"trainer": "rloo", "epsilon": 0.1},
        "trl_rloo",
        ["epsilon: each rollout is used for one update"],
    ),
    (
        {"normalize_advantages": True, "beta": 0},
        "trl_rloo,scale=batch_std,beta=0",
        ["deviation of the advant"],
    ),
    (
        {"loss_type": "grpo", "delta": 3.0},
        "trl_grpo,aggregation=sequence_mean,dual_clip=3",
        ["delta: each"],
    ),
    (
        {"loss_type": "dr_grpo", "ref_model_sync_steps": 64},
        "trl_grpo,aggregation=fixed_length",
        ["still on: scale_rewards", "ref_model_sync_steps: beta is 0"],
    ),
    ({"loss_type": "bnpo"}, "trl_grpo", ["one pass on one device"]),
    (
        {
            "loss_type": "bnpo",
            "per_device_train_batch_size": 1,
            "generation_batch_size": 8,
            **SEVERAL,
        },
        "trl_grpo,aggregation=sequence_mean",
        ["it is loss_type grpo", "used for several updates"],
    ),
    (
        {"loss_type": "cispo", "delta": 3, "sapo_temperature_pos": 2},
        "trl_grpo,ratio=none",
        ["At 1 or less", "delta: CISPO has", "sapo_temperature_pos: loss_type is not sapo"],
    ),
    (
        {"loss_type": "cispo", "beta": 0.3, "epsilon_high": 0.5, "entropy_coef": 0.01},
        "trl_grpo,ratio=none,beta=0.6,entropy_coef=0.02",
        ["does not multiply the KL", "does not multiply the entropy"],
    ),
    (
        {"loss_type": "cispo", "beta": 0.3, "epsilon_high": 5.0},
        "trl_grpo,ratio=cispo,epsilon=1,epsilon_high=4,beta=0.3",
        ["epsilon_high: each rollout"],
    ),
    (
        {"trainer": "rloo", "mask_truncated_completions": True},
        "trl_rloo,truncations=mask",
        ["lacks it"],
    ),
    ({"top_entropy_quantile": 0.2}, "trl_grpo", ["Tokens of low entropy have no"]),
    (
        {"top_entropy_quantile": 0.2, "importance_sampling_level": "sequence"},
        "trl_grpo,ratio=sequence_mean",
        ["Every token keeps its gradient"],
    ),
    (
        {
            "top_entropy_quantile": 0.2,
            "importance_sampling_level": "sequence",
            "loss_type": "vespo",
        },
        "trl_grpo,ratio=none",
        ["Tokens of low entropy have no", "importance_sampling_level: VESPO"],
    ),
    (
        {"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.1, **SEVERAL},
        "trl_grpo,ratio=cispo,epsilon=1,epsilon_high=4",
        ["epsilon: CISPO has its upper bound from epsilon_high"],
    ),
    (
        {"loss_type": "sapo", "sapo_temperature_neg": 2, "epsilon": 0.3},
        "trl_grpo,ratio=none,aggregation=sequence_mean",
        ["the slope of the gate is 1", "epsilon: this loss_type has no clip"],
    ),
    (
        {"loss_type": "vespo", "vespo_k_pos": 1},
        "trl_grpo,ratio=none",
        ["vespo_k_pos: each rollout"],
    ),
    (
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "scale_rewards": "batch"},
        "trl_grpo,ratio=sequence_mean,aggregation=sequence_sum,scale=batch_std",
        ["importance_sampling_level: each rollout"],
    ),
    (
        {
            "beta": 0.04,
            "use_vllm": True,
            "vllm_mode": "server",
            "ref_model_mixup_alpha": 0.5,
            **GROUP_OF_TWO,
        },
        "trl_grpo,beta=0.04",
        ["ref_model_mixup_alpha: sync_ref_model is off", "the gradient of k2", "leaves the sign"],
    ),
    ({"beta": 0.1, "use_bias_correction_kl": False}, "trl_grpo,beta=0.1,kl_estimator=k3", []),
    (
        {"use_vllm": False, "vllm_mode": "server", "steps_per_generation": 4, "epsilon": 0.3},
        "trl_grpo,epsilon=0.3",
        ["vllm_mode: use_vllm is off", "several updates"],
    ),
    (
        {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
        "trl_grpo,components=separate",
        ["GDPO", "scale_rewards: with normalize_then_sum"],
    ),
    (
        {"teacher_model_name_or_path": "big", "vllm_mode": "server"},
        "opd_full,aggregation=token_mean",
        ["prefix is held fixed", "has no reward", "vllm_mode: use_vllm is off"],
    ),
    (
        {"trainer": "distillation", "beta": 0, "temperature": 0.7},
        "opd_full,aggregation=token_mean",
        ["beta 0 is the forward KL", "between the two at that temperature"],
    ),
    (
        {"trainer": "gkd", "seq_kd": True},
        "opd_full,aggregation=token_mean",
        ["generalised Jensen-Shannon", "that the teacher samples", "at temperature 1", "dataset's"],
    ),
    (
        {"lmbda": 1.0, "seq_kd": True, "beta": 1.0, "max_new_tokens": 64, "loss_type": "dft"},
        "opd_full,aggregation=token_mean",
        ["seq_kd: with lmbda 1", "loss_type: GKDTrainer has a loss of its own"],
    ),
    (
        {"iw_opd_gamma": 0.3, "loss_top_k": 0},
        "opd,aggregation=token_mean",
        [
            "multiplied by 1 + iw_opd_gamma",
            "loss_top_k: distillation_objective is",
            "Tokens outside",
        ],
    ),
    (
        {"distillation_objective": "jsd", "iw_opd_gamma": 0, "lmbda": 0.5, "top_p": 1},
        "opd_full,aggregation=token_mean",
        ["is that of loss_top_k tokens", "iw_opd_gamma: distillation_objective is not", "lmbda 1"],
    ),
    *(
        (
            {"distillation_objective": "jsd", "loss_add_tail": False, "beta": beta},
            "opd_full,aggregation=token_mean,beta=0",
            ["is 0, and so is its gradient", "The student learns nothing"],
        )
        for beta in (0, 1)
    ),
    (
        {"distillation_objective": "jsd", "loss_add_tail": False, "beta": 0.5},
        "opd_full,aggregation=token_mean",
        ["where the two are one token, its gradient is 0", "prefix is held fixed"],
    ),
    (
        {"distillation_objective": "jsd", "loss_add_tail": False, "loss_top_k": 3},
        "opd_full,aggregation=token_mean",
        [
            "made to sum to 1",
            "prefix is held fixed",
            "number of tokens of the dataset's completions",
        ],
    ),
    (
        {"distillation_objective": "jsd", "loss_top_k": 0, "loss_add_tail": False},
        "opd_full,aggregation=token_mean",
        ["loss_add_tail: loss_top_k is 0", "prefix is held fixed"],
    ),
    (
        {"distillation_objective": "jsd", "loss_top_k": 5, "reverse_kl_top_1_mode": "argmax"},
        "opd_full,aggregation=token_mean",
        ["reverse_kl_top_1_mode: loss_top_k is not 1", "is that of loss_top_k tokens"],
    ),
    (
        {"distillation_objective": "jsd", "use_teacher_server": True},
        "opd_full,aggregation=token_mean",
        ["the passes of an update are added", "is the sampled one"],
    ),
    (
        {"iw_opd_gamma": 0.5, "gradient_accumulation_steps": 2},
        "opd,aggregation=token_mean",
        [
            "counts in full for each of the gradient_accumulation_steps",
            "With prompts alone it is 0",
        ],
    ),
    *(
        (
            {"distillation_objective": objective, "use_vllm": True, "vllm_sync_frequency": 4},
            f"{name},aggregation=token_mean",
            [remark],
        )
        for objective, name, remark in (
            ("jsd", "opd_full", "those of an older policy"),
            ("iw_opd", "opd", "and vllm_sync_frequency above 1"),
        )
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
    assert main(["lab", "exact", "--trl-config", str(path)]) == 0
    assert measured == [Estimator.preset(name), Estimator()]
    out = words(capsys.readouterr().out)
    assert [remark for remark in remarks if remark not in out] == []
    if "is 0, and so is its gradient" in remarks:
        assert "prefix is held fixed" not in out and "is shown in its place" not in out
    is_idle = any(re.match("[a-z_0-9]+: ", remark) for remark in remarks)
    assert ("changes nothing" in out) == is_idle


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("training_args.bin", "", "is a pickle"),
        ("a.yaml", "loss_type: grp", "Did you mean 'grpo'"),
        ("a.yaml", "losstype: grpo", "Did you mean 'loss_type'"),
        (
            "a.yaml",
            "learning_rate: 1",
            "has no field of these: GRPOConfig of TRL 1.16.0, RLOOConfig",
        ),
        (
            "a.yaml",
            "reward_clip_range: [0, 1]\nloss_type: grpo",
            "a GRPOConfig of TRL 1.16.0 has no field reward_clip_range",
        ),
        ("a.yaml", "trainer: gkd\nlmbda: 1.5", "lmbda"),
        ("a.yaml", "trainer: distillation\nlmbda: 1", "has no field lmbda"),
        ("a.yaml", "loss_type: cispo\nepsilon_high: 0", "epsilon_high"),
        ("a.yaml", "epsilon: 0.2.8", "epsilon was given as '0.2.8'"),
        ("a.json", "[1]", "a.json"),
    ],
)
def test_what_is_no_configuration_is_refused(
    name, text, message, measured, capsys, tmp_path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert main(["lab", "exact", "--trl-config", str(path)]) == 2 and measured == []
    assert message in capsys.readouterr().err


def test_the_table_has_the_defaults_of_trl(measured, capsys, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    for kind, name in ((trl.GRPOConfig, "trl_grpo"), (trl.RLOOConfig, "trl_rloo")):
        path = tmp_path / "exported.json"
        path.write_text(kind(output_dir=str(tmp_path), bf16=False, use_cpu=True).to_json_string())
        assert main(["lab", "exact", "--trl-config", str(path)]) == 0
        out = words(capsys.readouterr().out)
        assert measured[-2] == Estimator.preset(name)
        # no field differs from its default
        assert "changes nothing" not in out and "beyond" not in out


def test_the_table_has_the_defaults_of_trl_for_distillation(measured, capsys, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    from trl.experimental.gkd import GKDConfig
    from trl.experimental.iw_opd import IWOPDConfig

    kinds = {
        trl.DistillationConfig: "opd_full",
        GKDConfig: "opd_full",
        IWOPDConfig: "opd",
    }
    for kind, name in kinds.items():
        path = tmp_path / "exported.json"
        path.write_text(kind(output_dir=str(tmp_path), bf16=False, use_cpu=True).to_json_string())
        assert main(["lab", "exact", "--trl-config", str(path)]) == 0
        out = words(capsys.readouterr().out)
        assert measured[-2] == Estimator.preset(f"{name},aggregation=token_mean")
        assert f"source {kind.__name__} of TRL" in out
        assert "changes nothing" not in out


def test_a_preset_is_explained_beside_rloo(capsys) -> None:
    assert main(["lab", "exact", "--preset", "unsloth"]) == 0
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
    assert main(["lab", "exact", "--preset", "grpo", "--estimators", "rloo"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main(["lab", "exact", "--preset", "grpoo"]) == 2
    assert "Did you mean 'grpo'" in capsys.readouterr().err
