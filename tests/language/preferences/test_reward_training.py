"""Reward models: the loss and its gradient by hand, scores free of padding, and a run from start to end."""

import math

import numpy as np
import pytest
import torch
from folders import read_json, write_rows
from refusals import refused, stopped
from tiny_models import (
    ARCHITECTURES,
    apart,
    gradient,
    make_model,
    make_policy,
    make_tokenizer,
    weights,
)

from tokenrl.language import fit_reward_model, train_reward_model
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.preferences.data import reward_backbone
from tokenrl.language.preferences.evaluation import (
    clustered_stderr,
    encode_pairs,
    preference_metrics,
    score_pairs,
)
from tokenrl.language.preferences.fit import bradley_terry_loss
from tokenrl.language.preferences.pairs import Pair
from tokenrl.runs.metrics import read_metrics

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
TEXTS = [
    ("the cat", " sat", " on the mat and the dog"),
    ("a", " log", " b"),
    ("count", " to ten", ""),
]
PAIRS = [Pair(*texts) for texts in TEXTS]


def rows_to_learn(count=160):
    """The completion with more dogs is chosen."""
    rows = []
    for i in range(count):
        fewer, more = sorted((i % 5, (i + 1 + i // 5 % 4) % 5))
        row = {"prompt": f"the {i}", "chosen_gold": more, "rejected_gold": fewer}
        for name, dogs in (("chosen", more), ("rejected", fewer)):
            row[name] = " cat" * (4 - dogs) + " dog" * dogs
        rows.append(row)
    return rows


def fit(judge, pairs, **settings):
    """The metrics of each update of a reward model."""
    usual = {"batch_size": 3, "learning_rate": 0.1, "eval_every": 1}
    return fit_reward_model(judge, pairs, RewardModelArguments(**usual | settings))


def untrained(architecture="llama", kind="pad", **options):
    return reward_backbone((make_model(architecture, **options), make_tokenizer(kind)), seed=1)


@pytest.mark.parametrize("margin", [0.7, torch.tensor([0.0, 1.0, -0.5], dtype=torch.float64)])
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_loss_is_that_of_the_formula(margin, coefficient):
    chosen = torch.tensor([1.3, -0.2, 0.5], dtype=torch.float64)
    rejected = torch.tensor([0.1, 0.4, 0.5], dtype=torch.float64)
    options = {"center_rewards_coefficient": coefficient}
    loss = bradley_terry_loss(chosen, rejected, margin=margin, **options)
    p = 1 / (1 + (rejected + margin - chosen).exp())
    expected = (coefficient * (chosen + rejected) ** 2 - p.log()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*((name, "no_pad") for name in ARCHITECTURES), ("gpt2", "pad_is_eos")],
)
def test_padding_and_batch_change_neither_scores_nor_gradient(architecture, kind):
    judge = untrained(architecture, kind, dtype="float64")
    texts = [ids for pair in encode_pairs(judge, PAIRS) for ids in pair]
    assert len(set(map(len, texts))) > 4  # so that there is padding
    results = []
    for batches in ([[ids] for ids in texts], [texts]):
        scores = torch.cat([judge.logits(batch) for batch in batches])
        judge.model.zero_grad()
        (scores * torch.linspace(-1, 2, len(texts), dtype=torch.float64)).sum().backward()
        results.append((scores, gradient(judge.model)))
    (alone, slope), (together, other) = results
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    assert apart(other, slope) < 1e-9
    hidden = judge.model.base_model(input_ids=torch.tensor([texts[0]])).last_hidden_state[0, -1]
    assert (judge.model.score.weight @ hidden).item() == pytest.approx(alone[0].item(), abs=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_reward_model_keeps_the_backbone_and_draws_a_head(architecture, saved):
    policy = make_policy(architecture)
    before = weights(policy.model)
    judge = reward_backbone(policy, seed=1)
    of_files = reward_backbone(str(saved(architecture)), seed=1)
    assert torch.equal(weights(judge.model), weights(of_files.model))
    assert torch.equal(weights(judge.model.base_model), weights(policy.model.base_model))
    head = judge.model.score.weight
    assert head.shape == (1, 32) and 0.5 < head.std() * 33**0.5 < 1.5
    assert not torch.equal(head, reward_backbone(policy, seed=2).model.score.weight)
    fit(judge, PAIRS, max_steps=1)
    assert torch.equal(weights(policy.model), before)  # a copy was trained


MARGINS = [0.0, 2.0, -1.0]
COLUMN = [Pair(*texts, margin=margin) for texts, margin in zip(TEXTS, MARGINS, strict=True)]


@pytest.mark.parametrize(
    ("pairs", "setting", "margin"), [(PAIRS, 0.5, 0.5), (COLUMN, 0.0, torch.tensor(MARGINS))]
)
def test_the_first_update_follows_the_arguments(pairs, setting, margin):
    penalties = {"center_rewards_coefficient": 0.1}
    judge = untrained()
    rewards = torch.tensor(score_pairs(judge, encode_pairs(judge, pairs)))
    metrics = fit(judge, pairs, max_steps=3, learning_rate=1e-3, margin=setting, **penalties)
    assert [m["learning_rate"] for m in metrics] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    loss = bradley_terry_loss(*rewards.unbind(1), margin=margin, **penalties)
    difference = rewards[:, 0] - rewards[:, 1]
    expected = {
        "loss": loss,
        "margin": difference.mean(),
        "accuracy": (difference > 0).double().mean(),
    }
    for name, value in expected.items():
        assert metrics[0][name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_metrics_by_hand():
    rewards = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0], [3.0, -1.0]])
    golds = [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    pairs = [Pair(prompt, "a", "b", None, gold) for prompt, gold in zip("ppqr", golds, strict=True)]
    metrics = preference_metrics(rewards, pairs)
    expected = {
        "accuracy": (1 + 0 + 0.5 + 1) / 4,
        # over the prompts: sums of deviations -0.25 (p), -0.125 (q), 0.375 (r)
        "accuracy_stderr": math.sqrt(3 / 2 * (0.0625 + 0.015625 + 0.140625)) / 4,
        "loss": np.log1p(np.exp([-1, 1, 0, -4])).mean(),
        "margin": 1.0,
        "noise_ceiling": (1 + 1 + 0 + 0.5) / 4,
        "gold_agreement": (1 + 0 + 0.5) / 3,
    }
    assert metrics == pytest.approx(expected)
    metrics = preference_metrics(rewards, [Pair("p", "a", "b")] * 4)
    assert set(metrics) == {"accuracy", "loss", "margin"}
    values = np.array([1.0, 0.0, 1.0, 1.0])
    assert clustered_stderr(values, range(4)) == pytest.approx(values.std(ddof=1) / 2)


def test_a_run_learns_and_leaves_a_model_that_others_load(tmp_path, saved):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = {"max_steps": 25, "batch_size": 16, "learning_rate": 3e-3, "eval_size": 32}
    options |= {"data": rows_to_learn(), "model": str(saved()), "quiet": True}
    result = train_reward_model(**options, output_dir=tmp_path)
    before, after = result.eval_before["accuracy"], result.eval_after["accuracy"]
    assert before + 0.1 < after == result.eval_after["gold_agreement"] and after > 0.9
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert (lines[0]["eval_accuracy"], lines[25]["eval_accuracy"]) == (before, after)
    config = read_json(tmp_path / "config.json")
    assert config["pairs"] == {"train": 142, "held_out": 18}
    assert config["command"] == ""  # no command can name rows in memory
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| accuracy on held-out pairs | {after:.4g} |" in card

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    completions = [" 5 dog", " 5 dog dog cat dog", " cat"]
    texts = [f"the{completion}" for completion in completions]
    # as TRL calls a reward model
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    logits = model(**inputs).logits[:, 0].tolist()
    assert logits == pytest.approx(result.reward_model(["the"] * 3, completions), abs=1e-5)


def test_a_task_makes_its_own_preferences(tmp_path, cache):
    options = {"task": "vowels", "num_pairs": 60, "eval_size": 20, "max_steps": 2, "quiet": True}
    result = train_reward_model(output_dir=tmp_path / "run", noise_temperature=1.0, **options)
    file = tmp_path / "run" / "preferences.jsonl"
    assert 40 < len(file.read_text().splitlines()) <= 60
    assert 0.5 <= result.eval_after["noise_ceiling"] < 1
    # its own pairs, read back from the file
    train_reward_model(output_dir=tmp_path / "b", data=str(file), **options)


def test_preferences_that_are_given_as_the_task_are_the_data(tmp_path, saved):
    file = tmp_path / "prefs.ndjson"
    write_rows(file, rows_to_learn(20))
    options = {"model": str(saved()), "max_steps": 1, "quiet": True}
    options |= {"output_dir": tmp_path / "run", "overwrite": True}
    of_data, of_rows, of_task = (
        train_reward_model(**{name: source}, **options).eval_after
        for name, source in (("data", str(file)), ("task", rows_to_learn(20)), ("task", str(file)))
    )
    assert of_data == of_rows == of_task
    title = read_json(tmp_path / "run" / "config.json")["title"]
    assert title == f"Reward model, {file}, seed 0"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, r"data \(--data\).*task \(--task\)"),
        ({"model": None}, r"model \(--model\)"),
        (
            {"data": None, "task": [{"prompt": "a"}] * 4},
            "has no column 'chosen'.*Preferences are rows",
        ),
        ({"data": [GOOD, GOOD | {"chosen": "cat " * 200}] * 4}, "3 of 6 pairs.*64 tokens"),
        ({"data": [GOOD | {"margin": 1.0}] * 4, "margin": 0.5}, "'margin' were both given"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, words, tmp_path, saved):
    run = tmp_path / "run"
    options = {"data": [GOOD] * 8, "model": str(saved()), "output_dir": run, "quiet": True}
    with refused(words):
        train_reward_model(**options | changes)
    assert not run.exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    judge = untrained()
    options = {"data": rows_to_learn(20), "model": (judge.model, judge.tokenizer), "quiet": True}
    head = judge.model.score.weight.data.mul_(1e6)
    with stopped("loss of the reward model is inf at step 1"):
        center = {"margin": 1e30, "center_rewards_coefficient": 1e30}
        train_reward_model(output_dir=tmp_path / "run", **center, **options)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["exit_reason"] == "failed" and "inf" in summary["error"]
    head.fill_(math.nan)
    with refused(r"Before the first step: 8 of 8 rewards are not finite"):
        train_reward_model(output_dir=tmp_path / "other", **options)
