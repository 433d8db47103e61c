"""The recipe for pretrained models, with a model that is pretrained here: another tokenizer, another size."""

import ast
import json
import runpy
import sysconfig
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parent.parent / "recipes" / "pretrained_toy_task.py"


def docstrings() -> list[str]:
    """English text that every Python brings: the docstrings of its standard library."""
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found += [ast.get_docstring(node)] if ast.get_docstring(node) else []
    return found


def pretrain(folder: Path, steps: int = 80) -> None:
    """Save a Llama of 0.4 M parameters with a byte-level BPE tokenizer, after some steps of pretraining."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from toy_tasks.models import tiny_llama

    texts = docstrings()
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, vocab_size=600, special_tokens=["<|end|>"], show_progress=False)
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
def test_the_recipe_goes_from_the_model_as_it_is_over_the_warm_start_to_the_result(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    pretrain(tmp_path / "model")
    recipe, run = runpy.run_path(str(RECIPE)), tmp_path / "run"
    recipe["main"](
        recipe["Args"](model=str(tmp_path / "model"), task="target_length", max_steps=30, output_dir=run)
    )
    stages = json.loads((run / "stages.json").read_text())
    assert list(stages) == ["as it is", "warm-started", "trained"]
    rewards = [stage["reward"] for stage in stages.values()]
    assert rewards[0] < -0.9 and rewards[0] + 0.1 < rewards[1] < rewards[2] - 0.1
    assert stages["as it is"]["completions/clipped_ratio"] > 0.5
    assert stages["trained"]["completions/clipped_ratio"] < 0.1
    config = json.loads((run / "config.json").read_text())
    assert config["warm_started"]["updates"] == 150 and config["lora_r"] == 8
    said = capsys.readouterr().out
    assert "M parameters, LoRA)" in said or "k parameters, LoRA)" in said
    assert f"{rewards[2]:.3f} ±" in said.splitlines()[-2]  # the last row of the table
