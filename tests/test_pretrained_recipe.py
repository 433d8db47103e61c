"""The way of pretrained models, with a model that is pretrained here: another tokenizer, another size."""

import ast
import sysconfig
from pathlib import Path

import pytest
import torch

import tokenrl


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
