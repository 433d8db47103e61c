"""Runs in one program, each with a device and a precision of its own, which accelerate would keep."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_learner, make_policy, make_task

from tokenrl import train


@pytest.mark.parametrize("order", [("no", "bf16", "no"), ("bf16", "bf16", "no")])
def test_a_second_run_of_a_program_may_have_another_precision(order, tmp_path, recwarn):
    found = []
    for place, precision in enumerate(order):
        result = train(
            model=str(tmp_path / str(place - 1)) if place else make_policy(),
            task=make_task(),
            mixed_precision=precision,
            max_steps=1,
            prompts_per_step=2,
            num_generations=2,
            eval_generations=0,
            max_completion_length=6,
            output_dir=tmp_path / str(place),
            cpu=True,
            quiet=True,
        )
        found.append(result.policy)
        assert result.exit_code == 0 and next(result.policy.model.parameters()).dtype == torch.float32
    assert not [one for one in recwarn if "accelerat" in str(one.message).lower()]


def test_each_run_works_in_its_own_precision():
    ids, logits = torch.tensor([[4, 5, 6]]), []
    for precision in ("bf16", "no"):
        learner = make_learner(make_policy(), mixed_precision=precision)
        with torch.no_grad(), learner.accelerator.autocast():
            logits.append(learner.policy.model(ids).logits.float())
    assert not torch.equal(*logits) and torch.allclose(*logits, atol=0.5)
