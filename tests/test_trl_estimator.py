"""The recipe that trains in TRL with an estimator: its gradient is TRL's own, and any estimator trains."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from tokenrl import Estimator, Refused
from tokenrl.core import PRESETS

RECIPE = Path(__file__).parents[1] / "recipes" / "language" / "trl_estimator.py"
trl = pytest.importorskip("trl", reason="the extra benchmarks has TRL")


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE))


def length_of(completion_ids, **columns) -> list[float]:
    return [len(ids) + ids[0] / 7 for ids in completion_ids]


def gradients(recipe, folder, estimator=None, model_steps=1, **fields) -> list[torch.Tensor]:
    """The gradients of a tiny model in the updates of TRL's trainer, or of that of an estimator."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from toy_tasks.models import TinyModel

    model, tokenizer = TinyModel(tokens=tuple("0123456789"), layers=1, hidden=16)(seed=0)
    model.save_pretrained(folder / "model")
    model.config._name_or_path = str(folder / "model")  # from where TRL loads the reference
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **more):
            seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))

    config = trl.GRPOConfig(
        output_dir=str(folder),
        max_steps=model_steps,
        optim="sgd",
        learning_rate=0.1,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=5,
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        seed=3,
        **fields,
    )
    rows = Dataset.from_list([{"prompt": f"{n}{n}"} for n in range(10)] * 4)
    options = {"reward_funcs": length_of, "train_dataset": rows, "processing_class": tokenizer}
    options |= {"model": model.double(), "callbacks": [Watch()]}
    if estimator is None:
        trainer = trl.GRPOTrainer(args=config, **options)
    else:
        trainer = recipe["EstimatorTrainer"](estimator, config=config, **options)
    trainer.train()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("trl_grpo", {}),
        ("trl_grpo", {"gradient_accumulation_steps": 2}),
        ("trl_grpo,epsilon=0.01", {"epsilon": 0.01, "num_iterations": 2, "steps_per_generation": 2}),
        ("trl_grpo,aggregation=sequence_mean", {"loss_type": "grpo"}),
        ("trl_grpo,aggregation=fixed_length,scale=none", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        ("trl_grpo,aggregation=sequence_mean,ratio=none", {"loss_type": "sapo"}),
        (
            "trl_grpo,aggregation=sequence_sum,scale=batch_std",
            {"loss_type": "luspo", "scale_rewards": "batch"},
        ),
        ("trl_grpo,ratio=cispo,epsilon=1,epsilon_high=4", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("trl_grpo", {"loss_type": "bnpo"}),
        ("trl_grpo,ratio=none", {"loss_type": "vespo"}),
        ("trl_grpo,beta=0.3", {"beta": 0.3}),
    ],
)
def test_the_gradient_is_that_of_trl(preset, fields, recipe, tmp_path) -> None:
    steps = 3 if "num_iterations" in fields or "beta" in fields else 1
    precision = 1e-5 if "beta" in fields else 1e-6  # TRL has logprobs in float32: exp(d) - d - 1 loses digits
    ours = gradients(recipe, tmp_path, Estimator.preset(preset), steps, **fields)
    theirs = gradients(recipe, tmp_path, None, steps, **fields)
    assert len(ours) == len(theirs) == steps
    for one, other in zip(ours, theirs, strict=True):
        assert other.norm() > 1e-3 and float((one - other).norm() / other.norm()) < precision


def best_of_others(totals, group_size, mask, valid):
    groups = totals.reshape(-1, group_size)
    first, second = groups.topk(2, dim=1).values.split(1, dim=1)
    return (second + (first - second) * (groups < first)).flatten()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["rloo", "reinforce", "rloo,beta=0.1", best_of_others])
def test_any_estimator_trains(estimator, recipe, tmp_path) -> None:
    own = Estimator(baseline=estimator) if callable(estimator) else Estimator.preset(estimator)
    seen = gradients(recipe, tmp_path, own, 3)
    assert len(seen) == 3 and all(g.isfinite().all() and g.norm() > 0 for g in seen)
    assert not torch.equal(seen[0], gradients(recipe, tmp_path, Estimator.preset("trl_grpo"), 1)[0])


def test_what_trl_cannot_give_is_refused(recipe, tmp_path) -> None:
    config = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for name, preset in PRESETS.items():
        if preset.fields.get("baseline") == "value" or name in ("dapo", "remax"):
            with pytest.raises(Refused):
                recipe["EstimatorTrainer"](Estimator.preset(name), config=config)
