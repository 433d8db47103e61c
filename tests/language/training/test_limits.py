"""Steps that cannot be shared by the processes, and completions that never end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import tokenrl
from tokenrl.errors import Refused
from tokenrl.language.training.setup import make_accelerator
from toy_tasks.models import TinyModel

ROWS = [{"prompt": f"{x}{y}>"} for x in "abcd" for y in "abcd"]


@pytest.mark.parametrize(("prompts", "valid"), [(8, "6 or 9"), (2, "3")])
def test_a_step_that_processes_cannot_share_is_refused_with_the_valid_sizes(monkeypatch, prompts, valid):
    three = SimpleNamespace(num_processes=3)
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: three)
    args = SimpleNamespace(cpu=True, mixed_precision="no", prompts_per_step=prompts)
    with pytest.raises(Refused, match=rf"cannot be shared equally by 3 processes.* Give {valid}\."):
        make_accelerator(args)


def test_completions_that_never_end_are_counted_and_warned_of(tmp_path, capsys):
    model, tokenizer = TinyModel(tuple("abcd>"), layers=1, hidden=16, heads=2, context=16)(0)
    tokenizer.eos_token = None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    result = tokenrl.train(
        model=(model, tokenizer),
        task=ROWS,
        reward=lambda completions, **_: [text.count("a") for text in completions],
        output_dir=tmp_path / "run",
        max_steps=2,
        prompts_per_step=4,
        num_generations=4,
        max_completion_length=3,
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert result.exit_reason == "finished"
    assert '"completions/clipped_ratio": 1.0' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert shown.count("step 1: Every completion was cut at 3 tokens") == 1
