"""A run continues bit for bit from a checkpoint in its middle, whatever the model's architecture."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import FAMILIES, family_policy
from tiny_models import ENDS, make_task, make_tokenizer, vowel_reward

import tokenrl
from tests.states import state_of

KINDS = {
    "adapter": ("llama", "float32", {"lora_r": 2, "estimator": "remax"}),
    "bfloat16": ("llama", "bfloat16", {}),
    "critic": ("gpt2", "float32", {"estimator": "a2c"}),
    "minibatches": ("gpt2", "float32", {"estimator": "grpo", "num_iterations": 2, "num_minibatches": 2}),
    "float64": ("qwen2", "float64", {"estimator": "reinforce_running_mean", "diagnostics_every": 2}),
}


def continued(tmp_path, family, dtype="float32", **options):
    """Whether four steps equal the same four, of which the last two are made again from a checkpoint."""
    run = tmp_path / "run"

    def train(resume=None):
        policy = family_policy(family, dtype=dtype, vocabulary=96)
        policy.tokenizer, policy.eos_ids = make_tokenizer(), ENDS
        settings = {
            **{"model": policy, "task": make_task(), "reward": vowel_reward, "output_dir": run, "cpu": True},
            **{"estimator": "rloo", "max_steps": 4, "prompts_per_step": 3, "num_generations": 2},
            **{"max_completion_length": 6, "learning_rate": 0.01, "save_every": 2, "eval_every": 2},
            **{"warmup_steps": 3, "threads": 1, "quiet": True},
        }
        return tokenrl.train(**(settings | options), resume=resume)

    def left():
        weights = {path.name: path.read_bytes() for path in (run / "model").rglob("*.safetensors")}
        moments = state_of(run / "checkpoints" / "step_000004")
        summary = json.loads((run / "summary.json").read_text())
        results = {name: value for name, value in summary.items() if "second" not in name}
        return (run / "metrics.jsonl").read_bytes(), weights, moments, results

    before = {name: weight.clone() for name, weight in train().policy.model.state_dict().items()}
    whole = left()
    shutil.rmtree(run / "checkpoints" / "step_000004")
    after = train(resume=run / "checkpoints" / "step_000002").policy.model.state_dict()
    return whole == left() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "kind", ["critic", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "critic")]
)
def test_every_kind_of_training_continues_bit_for_bit(tmp_path, kind):
    family, dtype, options = KINDS[kind]
    assert continued(tmp_path, family, dtype, **options)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"recurrent_gemma"}))  # that one is refused
def test_every_family_continues_bit_for_bit(tmp_path, family):
    assert continued(tmp_path, family)
