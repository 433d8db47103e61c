"""A run reads the weights of its model once, which of a large one takes minutes."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

import tokenrl

SIZES = {"max_steps": 1, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 8}


@pytest.mark.parametrize("warm", [{}, {"warm_start": True, "warm_start_steps": 2}])
def test_a_run_reads_its_model_once(tmp_path, files, monkeypatch, warm):
    reads = []
    load = AutoModelForCausalLM.from_pretrained
    counted = lambda *args, **options: reads.append(args) or load(*args, **options)  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    data, model = str(files / "rows.jsonl"), str(files / "model")
    run = {"task": data, "reward": "exact_match", "model": model, "output_dir": str(tmp_path)}
    tokenrl.train(quiet=True, **run, **warm, **SIZES)
    assert len(reads) == 1
