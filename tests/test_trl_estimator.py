"""The recipe that trains in TRL with an estimator: its gradient is TRL's own, and any estimator trains."""

from __future__ import annotations

import runpy

import pytest
import torch
from folders import RECIPES

from tokenrl import Estimator, Refused
from tokenrl.core import PRESETS

RECIPE = RECIPES / "language" / "trl_estimator.py"
trl = pytest.importorskip("trl", reason="the extra benchmarks has TRL")


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE))


def length_of(completion_ids, **columns) -> list[float]:
    return [len(ids) + ids[0] / 7 for ids in completion_ids]


def odd(completion_ids, **columns) -> list[float]:
    return [float(ids[0] % 2) for ids in completion_ids]


def of_environment(prompts, trainer) -> dict:
    """Completions of which the environment has written every third token."""
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(2, 6, (len(prompts),), generator=draw).tolist()
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": [torch.randint(0, 10, (n,), generator=draw).tolist() for n in lengths],
        "logprobs": None,
        "env_mask": [[int(position % 3 != 1) for position in range(n)] for n in lengths],
    }


def gradients(recipe, folder, estimator=None, model_steps=1, **fields) -> list[torch.Tensor]:
    """The gradients of a tiny model in the updates of TRL's trainer, or of that of an estimator."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from toy_tasks.models import TinyModel

    model, tokenizer = TinyModel(tokens=tuple("0123456789"), layers=1, hidden=16)(seed=0)
    model.save_pretrained(folder / "model")
    model.config._name_or_path = str(folder / "model")  # from where TRL loads the reference
    gradients_of_steps = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **options):
            gradients_of_steps.append(
                torch.cat([p.grad.flatten().clone() for p in model.parameters()])
            )

    trainer_of_trl, rollout_func = fields.pop("trainer", "GRPO"), fields.pop("rollout_func", None)
    config = getattr(trl, f"{trainer_of_trl}Config")(
        output_dir=str(folder),
        max_steps=model_steps,
        optim="sgd",
        learning_rate=fields.pop("learning_rate", 0.1),
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
    options = {
        "reward_funcs": [length_of, odd],
        "train_dataset": rows,
        "processing_class": tokenizer,
    }
    options |= {"model": model.double(), "callbacks": [Watch()]}
    if rollout_func is not None:
        options["rollout_func"] = rollout_func
    if estimator is None:
        trainer = getattr(trl, f"{trainer_of_trl}Trainer")(args=config, **options)
    else:
        trainer = recipe["EstimatorTrainer"](estimator, config=config, **options)
    trainer.train()
    return gradients_of_steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("trl_grpo", {}),
        (
            "trl_grpo,epsilon=0.01",
            {"epsilon": 0.01, "num_iterations": 2, "steps_per_generation": 2},
        ),
        ("trl_grpo,aggregation=sequence_mean", {"loss_type": "grpo"}),
        (
            "trl_grpo,aggregation=fixed_length,scale=none",
            {"loss_type": "dr_grpo", "scale_rewards": "none"},
        ),
        ("trl_grpo,aggregation=sequence_mean,ratio=none", {"loss_type": "sapo"}),
        (
            "trl_grpo,aggregation=sequence_sum,scale=batch_std",
            {"loss_type": "luspo", "scale_rewards": "batch"},
        ),
        (
            "trl_grpo,ratio=cispo,epsilon=1,epsilon_high=4",
            {"loss_type": "cispo", "epsilon_high": 5.0},
        ),
        ("trl_grpo,ratio=none", {"loss_type": "vespo"}),
        ("trl_grpo,beta=0.3", {"beta": 0.3}),
        ("trl_grpo", {"rollout_func": of_environment}),
        ("trl_rloo", {"trainer": "RLOO"}),
        # TRL divides the whole step by another number
        (
            "trl_rloo,scale=batch_std,beta=0",
            {"trainer": "RLOO", "beta": 0.0, "normalize_advantages": True},
        ),
        ("trl_grpo,components=separate", {"multi_objective_aggregation": "normalize_then_sum"}),
    ],
)
def test_the_gradient_is_that_of_trl(preset, fields, recipe, tmp_path):
    is_direction = {"normalize_advantages", "multi_objective_aggregation"} & fields.keys()
    steps = 3 if {"num_iterations", "beta"} & fields.keys() and not is_direction else 1
    # TRL has logprobs in float32: exp(d) - d - 1 loses digits
    precision = 1e-5 if "beta" in fields else 1e-6
    of_grpo = {} if is_direction or "trainer" in fields else fields
    ours = gradients(recipe, tmp_path, Estimator.preset(preset), steps, **of_grpo)
    theirs = gradients(recipe, tmp_path, None, steps, **fields)
    assert len(ours) == len(theirs) == steps
    for item, expected in zip(ours, theirs, strict=True):
        scale = float(expected.norm() / item.norm()) if is_direction else 1.0
        assert expected.norm() > 1e-3
        assert float((scale * item - expected).norm() / expected.norm()) < precision


@pytest.mark.slow
def test_a_bound_of_cispo_below_1_multiplies_the_rewards_and_not_the_kl(recipe, tmp_path):
    """So the estimator has beta divided by the bound, and steps that are longer in proportion."""
    estimator = Estimator.preset("trl_grpo,ratio=none,beta=0.6")
    ours = gradients(recipe, tmp_path, estimator, 3, learning_rate=0.05)
    theirs = gradients(recipe, tmp_path, None, 3, loss_type="cispo", epsilon_high=0.5, beta=0.3)
    for item, expected in zip(ours, theirs, strict=True):
        assert float((item / 2 - expected).norm() / expected.norm()) < 1e-5


def best_of_others(totals, group_size, mask, valid):
    groups = totals.reshape(-1, group_size)
    first, second = groups.topk(2, dim=1).values.split(1, dim=1)
    return (second + (first - second) * (groups < first)).flatten()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["rloo,beta=0.1", best_of_others])
def test_any_estimator_trains(estimator, recipe, tmp_path):
    chosen = Estimator(baseline=estimator) if callable(estimator) else Estimator.preset(estimator)
    steps = gradients(recipe, tmp_path, chosen, 3)
    assert len(steps) == 3 and all(g.isfinite().all() and g.norm() > 0 for g in steps)
    assert not torch.equal(
        steps[0], gradients(recipe, tmp_path, Estimator.preset("trl_grpo"), 1)[0]
    )


def test_what_trl_cannot_give_is_refused(recipe, tmp_path):
    config = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for name, preset in PRESETS.items():
        if preset.fields.get("baseline") == "value" or name in ("dapo", "remax"):
            with pytest.raises(Refused):
                recipe["EstimatorTrainer"](Estimator.preset(name), config=config)
