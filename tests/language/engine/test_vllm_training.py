"""Runs that vLLM samples for: its numbers are the trainer's at every step, and a run lives as any other."""

from __future__ import annotations

import runpy

import pytest
from engines import trained, uneven, wide_policy
from folders import RECIPES
from tiny_environments import Guess
from tiny_models import ENDS, PROMPTS, apart, weights

from tokenrl.runs.metrics import read_metrics

pytestmark = pytest.mark.vllm
LORA = {"lora_r": 2}  # on all linear layers
TIED = {"tie_word_embeddings": True}


def rows_of(run):
    """The rows of metrics.jsonl after training steps."""
    return [line for line in read_metrics(run.output_dir / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    ("family", "config", "options", "limit"),
    [
        *(
            (family, {}, {}, 1e-4)
            for family in ("llama", "qwen2", "qwen3", "gpt2", "gemma3", "opt")
        ),
        ("gemma2", {}, {}, 1e-2),  # on a CPU vLLM approximates the soft cap of attention
        ("llama", TIED, {}, 1e-4),
        # what does not end at the first of them is refused
        ("llama", {}, {"stop": ("th", "e ", "<pad>")}, 1e-4),
        *(("qwen2", {"tie_word_embeddings": tied}, LORA, 1e-4) for tied in (False, True)),
        ("gpt2", {}, LORA, 1e-4),
        ("llama", {"dtype": "bfloat16"}, {}, 0.3),
        ("llama", {}, {"mixed_precision": "bf16"}, 0.3),
    ],
)
def test_sampler_and_trainer_agree_at_every_step(tmp_path, family, config, options, limit):
    policy = wide_policy(family, **config)
    policy.eos_ids = ENDS
    before = weights(policy.model)
    rows = rows_of(
        trained(tmp_path / "run", policy, **{"max_steps": 20, "learning_rate": 3e-3} | options)
    )
    gaps = [row["sampling/logp_difference/max"] for row in rows]
    assert len(gaps) == 20 and max(gaps) < limit, gaps
    assert options.get("lora_r") or apart(weights(policy.model), before) > 0.01
    assert all(abs(row["sampling/kept_mass"] - 1) < 10 * limit for row in rows)


def test_episodes_of_several_turns_run_unchanged(tmp_path):
    policy = wide_policy(max_position_embeddings=128)
    policy.eos_ids = ENDS
    task = [{"prompt": f"{prompt} {n}"} for prompt in PROMPTS for n in range(3)]
    options = {"task": task, "environment": Guess, "reward": [], "max_completion_length": 24}
    run = trained(tmp_path / "run", policy, eval_size=2, learning_rate=1e-4, **options)
    rows = rows_of(run)
    assert len(rows) == 3 and max(row["sampling/logp_difference/max"] for row in rows) < 1e-4
    assert max(row["episodes/turns"] for row in rows) > 1


def test_a_learning_rate_of_0_leaves_the_numbers_as_they_were(tmp_path):
    """A second run in the same process, from a model in memory and a configuration that was never saved."""
    rewards = []

    def recorded(completion_ids, **_):
        rewards.append(uneven(completion_ids))
        return rewards[-1]

    policy = wide_policy()
    pair = policy.model, policy.tokenizer
    for name in ("first", "second"):
        run = trained(tmp_path / name, pair, reward=recorded, learning_rate=1e-30, max_steps=20)
        assert max(row["sampling/logp_difference/max"] for row in rows_of(run)) < 1e-5
    half = len(rewards) // 2
    assert rewards[:half] == rewards[half:]


def test_a_server_of_the_recipe_samples_from_each_version_of_the_adapter(tmp_path, monkeypatch):
    """After the second step it loses the adapter, as if it had been started again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = RECIPES / "language" / "vllm_server.py"
    versions, engines = [], []

    class Server(runpy.run_path(str(recipe))["VllmServer"]):
        def sync(self, policy):
            super().sync(policy)
            matrices = [p for name, p in policy.model.named_parameters() if "lora_B" in name]
            versions.append((self.names[-1], sum(float(p.detach().abs().sum()) for p in matrices)))
            engines.append(self)

    def lose(step, _):
        if step == 2:
            engines[0].ask("/v1/unload_lora_adapter", {"lora_name": versions[-1][0]})

    policy = wide_policy("qwen2")
    policy.eos_ids = ENDS
    options = {"max_steps": 6, "top_k": 40, "temperature": 0.9, "callback": lose} | LORA
    rows = rows_of(trained(tmp_path / "run", policy, generator=Server, **options))
    gaps = [row["sampling/logp_difference/max"] for row in rows]
    assert len(gaps) == 6 and max(gaps) < 1e-4, gaps
    assert len(set(versions)) == len(versions) > 6 and versions[0][1] == 0 < versions[-1][1]
    assert engines[0].process.returncode is not None
