"""SGD: its step is the gradient itself, it continues bit for bit, and no rate for AdamW is taken for it."""

from __future__ import annotations

import shutil

import pytest
import torch
from saved_states import equal, through_a_checkpoint
from tiny_models import gradient, make_learner, make_policy, make_task, one_step, vowel_reward, weights

import tokenrl
from tokenrl.errors import Refused
from tokenrl.runs.checkpoint import read_state

QUICK = {
    "prompts_per_step": 2,
    "num_generations": 3,
    "eval_generations": 0,
    "cpu": True,
    "threads": 1,
    "quiet": True,
}


def sgd(**options):
    return make_learner(make_policy(dtype="float64"), "rloo", optimizer="sgd", **options)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_step_without_clipping_is_the_gradient_times_the_rate(decay):
    learner = sgd(learning_rate=0.3, max_grad_norm=0.0, weight_decay=decay)
    other = make_learner(make_policy(dtype="float64"), "rloo", max_grad_norm=0.0)
    before = weights(learner.policy.model)
    one_step(learner)
    one_step(other)  # AdamW's, whose gradient is the same
    expected = before - 0.3 * (gradient(other.policy.model) + decay * before)
    assert gradient(other.policy.model).norm() > 0.1
    torch.testing.assert_close(weights(learner.policy.model), expected, rtol=0, atol=1e-14)


def test_a_factor_of_the_reward_is_a_factor_of_the_step_unless_it_is_clipped():
    def moved(factor, limit):
        learner = sgd(learning_rate=0.1, max_grad_norm=limit)
        before = weights(learner.policy.model)
        one_step(learner, reward=lambda **rows: [factor * one for one in vowel_reward(**rows)])
        return float((weights(learner.policy.model) - before).norm())

    assert moved(2.0, 0.0) == pytest.approx(2 * moved(1.0, 0.0), rel=1e-6)
    assert moved(20.0, 0.5) == pytest.approx(moved(10.0, 0.5), rel=1e-5) == pytest.approx(0.05, rel=1e-5)


def test_a_learner_continues_without_moments():
    whole, part = sgd(), sgd()
    one_step(whole)
    state = through_a_checkpoint(whole.state_dict())
    moments = [value for one in state["optimizer"]["state"].values() for value in one.values()]
    assert not any(isinstance(value, torch.Tensor) for value in moments)
    part.load_state_dict(state)
    part.policy.model.load_state_dict(through_a_checkpoint(dict(whole.policy.model.state_dict())))
    for learner in (whole, part):
        one_step(learner, step=2)
    assert torch.equal(weights(whole.policy.model), weights(part.policy.model))


def run(folder, **options):
    known = {"model": make_policy(), "task": make_task(), "output_dir": folder, "max_steps": 4}
    return tokenrl.train(**known | QUICK | options)


def test_a_run_continues_bit_for_bit_but_not_with_another_optimiser(tmp_path):
    how = {"optimizer": "sgd", "learning_rate": 0.1, "mixed_precision": "bf16", "lr_scheduler_type": "linear"}
    run(tmp_path / "whole", **how, save_every=2)
    run(tmp_path / "part", **how, save_every=2)
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step_000004")  # as if killed after step 2
    with pytest.raises(Refused, match="optimizer: 'sgd', now 'adamw'"):
        run(tmp_path / "part", **how | {"optimizer": "adamw"}, save_every=2, resume="auto")
    run(tmp_path / "part", **how, save_every=2, resume="auto")
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "part")]
    assert texts[0] == texts[1] and texts[0].count("\n") == 5
    states = [read_state(tmp_path / name / "checkpoints" / "step_000004") for name in ("whole", "part")]
    assert equal(*(state["learner"] for state in states))
    assert '"optimizer": "sgd"' in (tmp_path / "part" / "config.json").read_text()


def test_a_rate_is_needed(tmp_path, capsys):
    with pytest.raises(Refused, match=r"optimizer='sgd' was given without a learning_rate.*0\.06"):
        run(tmp_path / "run", optimizer="sgd")
    assert not (tmp_path / "run" / "config.json").exists()


def test_no_rate_of_adamw_is_called_usual(tmp_path, capsys):
    result = run(tmp_path / "run", optimizer="sgd", learning_rate=5.0, check=True, quiet=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "5, sgd" in said and "usual" not in said and "unusual-rate" not in result.flags
    adamw = run(tmp_path / "run", learning_rate=5.0, check=True, quiet=False)
    assert "unusual-rate" in adamw.flags
