"""Projected scores and the estimators formed from them, on a transformer where all true values are known."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import write_rows
from refusals import refused
from tiny_lab_model import WORDS, points, tiny_policy
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.files import plain
from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.lab.measure.contributions import contributions
from tokenrl.lab.measure.measurement import measure_gradients, measure_with, print_tables
from tokenrl.lab.measure.projections import chosen_parameters, probes, project
from tokenrl.language.commands.samples import Samples, collect_samples
from tokenrl.language.policy.model import Policy, add_lora, load_policy
from tokenrl.language.policy.saving import save_policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Regime, score
from tokenrl.language.tasks.task import PromptTask
from tokenrl.language.training.loop import train
from tokenrl.language.training.teacher import with_teacher
from tokenrl.runs.console import Console
from tokenrl.settings import arguments

torch.set_num_threads(1)
GRPO = Estimator.preset("grpo")
PLAIN = {"distribution": Distribution(), "regime": Regime()}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="module")
def samples(policy: Policy) -> Samples:
    rows = [{"prompt": WORDS[i % 2]} for i in range(16)]
    return collect_samples(policy, Rewards(points), rows, Sampling(2, 4, seed=3), rows_at_once=24)


@pytest.fixture(scope="module")
def taught(policy: Policy) -> Samples:
    """Samples without a reward, with a teacher."""
    rows = [{"prompt": WORDS[i % 2]} for i in range(16)]
    learner = with_teacher(policy, tiny_policy(seed=1))
    how = Sampling(2, 4, seed=3)
    return collect_samples(learner, Rewards(points), rows, how, rows_at_once=24).unrewarded()


def directions(policy: Policy, count: int, seed: int = 0, chunk: int = 8) -> torch.Tensor:
    """The probes as one matrix [K, D], in the order of the parameters, as `project` scales them."""
    parameters = chosen_parameters(policy)
    drawn = probes(parameters, count, seed=seed, chunk=chunk)
    return (
        torch.cat([torch.cat([p[n].flatten(1) for n in parameters], 1) for p in drawn]) / count**0.5
    )


def projected_samples(policy: Policy, samples: Samples, count: int) -> torch.Tensor:
    options = {"count": count, "seed": 0, "max_length": 2, **PLAIN}
    parts = [project(policy, p, chosen_parameters(policy), **options) for p in samples.parts]
    return torch.cat(parts)


# Projected scores


def test_probes_are_signs_that_the_seed_decides_and_no_chunk_moves(policy: Policy):
    whole, parts, other = (directions(policy, 7, *x) for x in ((1, 7), (1, 3), (2**32 - 1, 7)))
    assert torch.equal(whole, parts) and not torch.equal(whole, other)
    assert len(whole.abs().unique()) == 1
    correlations = 7 * whole @ whole.T / whole.shape[1] - torch.eye(7)
    assert correlations.abs().max() < 6 / whole.shape[1] ** 0.5


def test_layers_are_chosen_by_name(policy: Policy):
    names = list(chosen_parameters(policy))
    parts = list(chosen_parameters(policy, ["h.0.attn", "ln_f"]))
    assert parts == [n for n in names if "h.0.attn" in n or "ln_f" in n]


# Estimators formed from projections


@pytest.mark.parametrize(
    "estimator",
    [
        Estimator(),
        GRPO,
        Estimator.preset("dapo"),
        Estimator.preset("reinforce_pp"),
        Estimator.preset("gspo"),
        Estimator.preset("remax"),
        Estimator(returns="reward_to_go", aggregation="token_mean"),
        Estimator.preset("opd"),
        Estimator.preset("opd_to_go"),
    ],
    ids=lambda e: f"{e.baseline}-{e.scale}-{e.aggregation}-{e.ratio}-{e.beta:g}",
)
def test_a_step_is_the_gradient_that_training_takes(
    policy: Policy, samples: Samples, taught: Samples, estimator
) -> None:
    """The loss of one step of four prompts, once through the model and autograd, once from projections."""
    z, seen = directions(policy, 9), taught if estimator.beta else samples
    rows = torch.arange(16)
    part = seen.parts[0].take(rows)
    old = seen.logprobs[rows]
    columns = {"logprobs": old, "ref_logprobs": seen.ref_logprobs[rows]}
    advantages, weights, mask, *_ = estimator.loss_terms(
        seen.rewards[rows],
        part.mask.double(),
        group_size=4,
        max_length=2,
        greedy_rewards=seen.greedy_rewards[rows],
        **columns,
    )
    logprobs = score(policy.model, part).logprobs
    loss = estimator.loss(
        logprobs, advantages, weights, mask, old_logprobs=old, ref_logprobs=columns["ref_logprobs"]
    )
    grads = torch.autograd.grad(loss, policy.trainable_parameters())
    wanted = -z @ torch.cat([g.flatten() for g in grads])
    assert wanted.norm() > 1e-3
    found = projected_samples(policy, seen, 9)
    units = contributions(estimator, seen, found, prompts_per_step=4)
    assert units.coupled == (
        estimator.aggregation == "token_mean" or estimator.scale == "token_whiten"
    )
    mean = units.values[: 4 // units.groups].mean(0)
    assert_close(mean, wanted, rtol=1e-8, atol=1e-8)


def test_what_a_teacher_says_is_that_of_its_own_pass(policy: Policy, taught: Samples):
    for part, logprobs in zip(taught.parts, taught.ref_logprobs.split(24), strict=True):
        reference = score(tiny_policy(seed=1).model, part).logprobs.detach()
        assert_close(logprobs[:, : part.mask.shape[1]], reference * part.mask)


def test_a_running_mean_has_seen_the_other_steps_only(policy: Policy, samples: Samples):
    seen = projected_samples(policy, samples, 8)
    found = contributions(
        Estimator(baseline="running_mean"), samples, seen, prompts_per_step=8
    ).values
    # of groups, of rows
    for step, others in (
        (slice(8), slice(32, None)),
        (slice(8, None), slice(32)),
    ):
        mean = Estimator(
            baseline="constant", baseline_constant=float(samples.rewards[others].mean())
        )
        expected = contributions(mean, samples, seen, prompts_per_step=8).values
        assert_close(found[step], expected[step])


def test_dropped_groups_leave_the_divisor_of_their_step(policy: Policy, samples: Samples):
    rewards = samples.rewards.clone()
    rewards[4:8] = 0.5
    flat = replace(samples, rewards=rewards)
    seen = projected_samples(policy, samples, 5)
    dropped = contributions(Estimator(zero_spread="drop"), flat, seen, prompts_per_step=4)
    kept = contributions(Estimator(), flat, seen, prompts_per_step=4)
    assert dropped.coupled and not kept.coupled
    assert_close(dropped.values[0], kept.values[[0, 2, 3]].mean(0), rtol=1e-12, atol=1e-14)
    assert_close(dropped.values[1], kept.values[4:8].mean(0), rtol=1e-12, atol=1e-14)


ROWS = [{"prompt": word} for word in WORDS * 8]
TASK = PromptTask(
    name="points", train_prompts=ROWS, eval_prompts=ROWS, reward=points, max_completion_length=2
)
FEW = {"task": TASK, "num_prompts": 16, "num_generations": 4, "prompts_per_step": 2, "probes": 8}


def test_measure_from_python_its_record_and_its_tables(policy: Policy, capsys):
    found = measure_gradients(model=policy, estimators=("rloo", "grpo", "dapo"), **FEW)
    assert [m.estimator for m in found.estimators] == ["rloo", "grpo", "dapo"]
    assert plain(vars(found))["estimators"][0]["noise"].keys() == {"value", "low", "high"}
    print_tables(found)
    printed = capsys.readouterr().out
    assert "Over 16 prompts of points with 4 completions" in printed and "not resolved" in printed
    again = measure_gradients(model=policy, estimators=("rloo",), rows_at_once=8, **FEW)
    assert again.estimators[0].variance.value == pytest.approx(
        found.estimators[0].variance.value, rel=1e-9
    )


def test_a_teacher_is_measured_beside_the_reward_and_not_with_it(policy: Policy):
    teacher = (tiny_policy(seed=1).model, policy.tokenizer)
    measured = measure_gradients(model=policy, teacher=teacher, **FEW)
    rloo, opd, to_go = measured.estimators
    assert [rloo.estimator, opd.estimator, to_go.estimator] == ["rloo", "opd", "opd_to_go"]
    task = replace(TASK, reward=lambda prompts, **_: [float(len(p)) for p in prompts])
    again = measure_gradients(model=policy, teacher=teacher, **FEW | {"task": task}).estimators
    assert again[1].variance == opd.variance and again[0].variance != rloo.variance


def test_a_task_of_one_prompt_has_it_in_every_group(policy: Policy):
    variances = []
    for rows in (ROWS[:1], ROWS[:1] * 16):
        task = replace(TASK, train_prompts=rows)
        measured = measure_gradients(model=policy, estimators=("rloo",), **FEW | {"task": task})
        variances.append(measured.estimators[0].variance.value)
    assert variances[0] == variances[1] > 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_prompts": 9}, "multiple of 2"),
        ({"estimators": ("ppo",)}, "critic"),
        ({"estimators": ("rloo,entropy_coef=0.1",)}, "no entropies"),
        ({"estimators": ("rlo",)}, "Did you mean 'rloo'"),
        ({"num_prompts": 32}, "has 16 training prompts"),
        ({"gradient_checkpointing": True}, "without it"),
        ({"layers": ("h.7",)}, "in its name"),
    ],
    ids=str,
)
def test_mistakes_are_refused(policy: Policy, wrong, words):
    with refused(words):
        measure_gradients(model=policy, **(FEW | wrong))


def test_a_run_is_measured_on_its_own_task_as_evaluate_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows("rows.jsonl", [{"prompt": f"{i:02}"} for i in range(40)])
    options = {"task": "rows.jsonl", "reward": "length(target=3)", "model": "tiny", "max_steps": 1}
    sizes = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 3}
    train(**options, **sizes, temperature=0.7, eval_every=0, output_dir="run", quiet=True)
    how = {name: value for name, value in FEW.items() if name != "task"} | {"estimators": "rloo"}
    page = io.StringIO()
    measured = measure_with(arguments(MeasureArguments, how | {"model": "run"}), Console(file=page))
    assert measured.task == "rows.jsonl" and "temperature 0.7" in page.getvalue()
    assert measured.settings["completions/mean_length"] <= 3
    Path("run/config.json").write_text(
        Path("run/config.json").read_text().replace("length(", "a.py:(")
    )
    with refused("trust_run"):
        measure_gradients(model="run", **how)
    with refused("Name the task to measure on"):
        measure_gradients(model=tiny_policy(), **how)


def test_the_prompts_are_drawn_by_the_seed_from_all_rows(policy: Policy):
    drawn = []

    def noted(completion_ids, number, **_):
        drawn.append({*number})
        return [float(len(ids)) for ids in completion_ids]

    rows = [{"prompt": "a", "number": i} for i in range(48)]
    task = replace(TASK, train_prompts=rows, reward=noted)
    for seed in (0, 0, 1):
        measure_gradients(model=policy, **FEW | {"task": task, "seed": seed, "estimators": "rloo"})
    assert drawn[0] == drawn[2] != drawn[4] and max(drawn[0]) > 16 == len(drawn[0])


def test_of_a_run_that_trained_an_adapter_that_adapter_is_measured(tmp_path):
    base = tiny_policy()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    policy = load_policy(tmp_path / "base", dtype="float64")
    add_lora(policy, r=2)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(0.1)
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_policy(policy, tmp_path / "run" / "model")
    how = {"estimators": ("rloo",), "dtype": "float64", **FEW}
    page = io.StringIO()
    found = measure_with(MeasureArguments(model=str(tmp_path / "run"), **how), Console(file=page))
    assert "trained an adapter" in page.getvalue() and found.model.endswith("adapter")
    again = measure_gradients(model=policy, **how)
    assert found.estimators[0].variance.value == pytest.approx(
        again.estimators[0].variance.value, rel=1e-9
    )
    merged = measure_gradients(model=str(tmp_path / "run" / "model"), **how)  # all weights
    assert merged.estimators[0].variance.value > 2 * found.estimators[0].variance.value
    (tmp_path / "base" / "config.json").unlink()
    with refused("could be loaded from"):
        measure_gradients(model=str(tmp_path / "run"), **how)
