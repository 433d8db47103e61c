"""Reward models: the loss and its gradient by hand, scores free of padding, and a run from start to end."""

import json
import math

import numpy as np
import pytest
import torch
from saved_states import equal, through_a_checkpoint
from tiny_models import (
    ARCHITECTURES,
    apart,
    gradient,
    make_model,
    make_policy,
    make_tokenizer,
    weights,
)

from tokenrl.errors import Refused, Stopped
from tokenrl.language import fit_reward_model, train_reward_model
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.preferences.data import reward_backbone
from tokenrl.language.preferences.evaluation import (
    clustered_stderr,
    encode_pairs,
    expected_calibration_error,
    preference_metrics,
    score_pairs,
)
from tokenrl.language.preferences.fit import PreferenceTraining, bradley_terry_loss
from tokenrl.language.preferences.pairs import Pair, read_pairs
from tokenrl.language.rewards.model import RewardModel
from tokenrl.runs.report import report_from_directory

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
TEXTS = [
    ("the cat", " sat", " on the mat and the dog"),
    ("a", " log", " b"),
    ("count", " to ten", ""),
]
PAIRS = [Pair(*texts) for texts in TEXTS]


def rows_to_learn(count=160, seed=0):
    """The completion with more dogs is chosen."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = [
            generator.permutation(["dog"] * n + ["cat"] * (4 - n))
            for n in generator.permutation(5)[:2]
        ]
        texts = sorted((" " + " ".join(w) for w in words), key=lambda text: -text.count("dog"))
        row = {"prompt": f"the {i}", "chosen": texts[0], "rejected": texts[1]}
        rows.append(
            row | {f"{name}_gold": float(row[name].count("dog")) for name in ("chosen", "rejected")}
        )
    return rows


def fit(judge, pairs, **settings):
    """The metrics of each update of a reward model."""
    usual = {"batch_size": 3, "learning_rate": 0.1, "eval_every": 1}
    return fit_reward_model(judge, pairs, RewardModelArguments(**usual | settings))


def untrained(architecture="llama", kind="pad", **options):
    return reward_backbone((make_model(architecture, **options), make_tokenizer(kind)), seed=1)


@pytest.mark.parametrize("margin", [0.0, 0.7, torch.tensor([0.0, 1.0, -0.5], dtype=torch.float64)])
@pytest.mark.parametrize(
    ("coefficient", "smoothing"), [(0.0, 0.0), (0.05, 0.0), (0.0, 0.1), (0.3, 0.2)]
)
def test_the_loss_and_its_gradient_are_those_of_the_formula(margin, coefficient, smoothing):
    chosen = torch.tensor([1.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 0.4, 0.5], dtype=torch.float64, requires_grad=True)
    options = {"center_rewards_coefficient": coefficient, "label_smoothing": smoothing}
    loss = bradley_terry_loss(chosen, rejected, margin=margin, **options)
    loss.backward()
    margins = torch.as_tensor(margin, dtype=torch.float64).expand(3).tolist()
    expected, by_chosen, by_rejected = 0.0, [], []
    for c, r, m in zip(chosen.tolist(), rejected.tolist(), margins, strict=True):
        p = 1 / (1 + math.exp(-(c - r - m)))
        expected -= ((1 - smoothing) * math.log(p) + smoothing * math.log(1 - p)) / 3
        expected += coefficient * (c + r) ** 2 / 3
        by_chosen.append((p - (1 - smoothing) + 2 * coefficient * (c + r)) / 3)
        by_rejected.append(((1 - smoothing) - p + 2 * coefficient * (c + r)) / 3)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert chosen.grad.tolist() == pytest.approx(by_chosen, rel=1e-12)
    assert rejected.grad.tolist() == pytest.approx(by_rejected, rel=1e-12)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*((name, "no_pad") for name in ARCHITECTURES), ("llama", "pad"), ("gpt2", "pad_is_eos")],
)
def test_padding_and_batch_change_neither_scores_nor_gradient(architecture, kind):
    judge = untrained(architecture, kind, dtype="float64")
    encoded = encode_pairs(judge, PAIRS)
    assert len({len(ids) for both in encoded for ids in both}) > 4  # so that there is padding

    alone = [judge.logits([ids]) for both in encoded for ids in both]  # no row has a neighbour
    single = sum(
        bradley_terry_loss(c, r) for c, r in zip(alone[::2], alone[1::2], strict=True)
    ) / len(PAIRS)
    single.backward()
    by_one = gradient(judge.model)
    judge.model.zero_grad()
    chosen, rejected = judge.logits([e[0] for e in encoded] + [e[1] for e in encoded]).chunk(2)
    bradley_terry_loss(chosen, rejected).backward()
    together = torch.stack([chosen, rejected], dim=1).flatten().tolist()
    assert together == pytest.approx([a.item() for a in alone], abs=1e-12)
    assert apart(gradient(judge.model), by_one) < 1e-9

    hidden = judge.model.base_model(input_ids=torch.tensor([encoded[0][0]])).last_hidden_state[
        0, -1
    ]
    assert (judge.model.score.weight @ hidden).item() == pytest.approx(alone[0].item(), abs=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_reward_model_keeps_the_backbone_and_draws_a_head(architecture, saved):
    policy = make_policy(architecture)
    before = weights(policy.model)
    of_policy, of_files = (
        reward_backbone(policy, seed=1),
        reward_backbone(str(saved(architecture)), seed=1),
    )
    assert torch.equal(weights(of_policy.model), weights(of_files.model))
    assert torch.equal(weights(of_files.model.base_model), weights(policy.model.base_model))
    head, other = (reward_backbone(policy, seed=seed).model.score.weight for seed in (1, 2))
    assert head.shape == (1, 32) and torch.equal(head, of_files.model.score.weight)
    assert not torch.equal(head, other) and 0.1 < head.std() * 33**0.5 < 2
    fit(of_policy, PAIRS, max_steps=1)
    assert torch.equal(weights(policy.model), before)  # a copy was trained
    assert policy.model.config.num_labels == 2
    assert not torch.equal(weights(of_policy.model), weights(of_files.model))


def test_the_first_update_follows_the_arguments():
    def first(args, pairs=PAIRS):
        metrics = fit(untrained(), pairs, max_steps=3, learning_rate=1e-3, **args)
        assert [m["learning_rate"] for m in metrics] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
        return metrics[0]

    judge = untrained()
    rewards = torch.tensor(score_pairs(judge, encode_pairs(judge, PAIRS)))
    for args in (
        {},
        {"margin": 0.5},
        {"center_rewards_coefficient": 0.1},
        {"label_smoothing": 0.2},
    ):
        expected = bradley_terry_loss(rewards[:, 0], rewards[:, 1], **args)
        assert first(args)["loss"] == pytest.approx(expected.item(), rel=1e-5)
    difference = rewards[:, 0] - rewards[:, 1]
    assert first({})["accuracy"] == pytest.approx((difference > 0).double().mean().item(), rel=1e-6)
    assert first({})["margin"] == pytest.approx(difference.mean().item(), rel=1e-4, abs=1e-6)
    column = [Pair(*texts, margin=m) for texts, m in zip(TEXTS, (0.0, 2.0, -1.0), strict=True)]
    margins = torch.tensor([0.0, 2.0, -1.0])
    expected = bradley_terry_loss(rewards[:, 0], rewards[:, 1], margin=margins)
    assert first({}, column)["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_metrics_by_hand():
    rewards = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0], [3.0, -1.0]])
    golds = [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    pairs = [Pair(prompt, "a", "b", None, gold) for prompt, gold in zip("ppqr", golds, strict=True)]
    found = preference_metrics(rewards, pairs)
    assert found["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["noise_ceiling"] == (1 + 1 + 0 + 0.5) / 4
    assert found["gold_agreement"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["margin"] == 1.0
    losses = [math.log1p(math.exp(-d)) for d in (1, -1, 0, 4)]
    assert found["loss"] == pytest.approx(sum(losses) / 4)
    # over the prompts: sums of deviations -0.25 (p), -0.125 (q), 0.375 (r)
    assert found["accuracy_stderr"] == pytest.approx(
        math.sqrt(3 / 2 * (0.0625 + 0.015625 + 0.140625)) / 4
    )
    assert "noise_ceiling" not in preference_metrics(rewards, [Pair("p", "a", "b")] * 4)
    assert "accuracy_stderr" not in preference_metrics(rewards, [Pair("p", "a", "b")] * 4)
    values = np.array([1.0, 0.0, 1.0, 1.0])
    assert clustered_stderr(values, range(4)) == pytest.approx(values.std(ddof=1) / 2)


def test_calibration_by_hand():
    signs, p = np.array([1, -1, 1, 1]), np.array([0.81, 0.83, 0.82, 0.52])
    difference = np.append(signs * np.log(p / (1 - p)), 1e3)  # in bins of 1, 3 and 1
    expected = (abs(1 - 0.52) + 3 * abs(2 / 3 - 0.82) + 0) / 5
    assert expected_calibration_error(difference) == pytest.approx(expected)


def test_a_run_learns_and_leaves_a_model_that_others_load(tmp_path, saved):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = {
        "max_steps": 25,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "eval_size": 32,
        "quiet": True,
    }
    run = tmp_path / "run"
    result = train_reward_model(data=rows_to_learn(), model=str(saved()), output_dir=run, **options)
    assert result.eval_before["accuracy"] < 0.8 < 0.9 < result.eval_after["accuracy"]
    assert result.eval_after["noise_ceiling"] == 1 and result.steps == 25
    assert result.eval_after["gold_agreement"] == result.eval_after["accuracy"]
    assert json.loads((run / "summary.json").read_text())["eval_after"] == result.eval_after
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(26))
    assert len((run / "timings.jsonl").read_text().splitlines()) == 25
    assert lines[0]["eval_accuracy"] == result.eval_before["accuracy"]
    assert lines[25]["eval_accuracy"] == result.eval_after["accuracy"]
    config = json.loads((run / "config.json").read_text())
    assert config["pairs"] == {"train": 128, "held_out": 32} and config["max_steps"] == 25
    # no command can name rows in memory
    assert (config["kind"], config["command"]) == (
        "reward-model",
        "",
    )
    card = (run / "model" / "README.md").read_text()
    assert "started from Python" in card and f"base_model: {config['model']}" in card
    assert f"| accuracy on held-out pairs | {result.eval_after['accuracy']:.4g} |" in card

    load = AutoModelForSequenceClassification.from_pretrained
    model, loading = load(run / "model", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert not loading["missing_keys"] and model.config.num_labels == 1
    texts = ["the 5 dog", "the 5 dog dog cat dog", "the cat"]
    how = {
        "return_tensors": "pt",
        "padding": True,
        "padding_side": "right",
        "add_special_tokens": False,
    }
    inputs = tokenizer(texts, **how)  # as TRL calls a reward model
    with torch.no_grad():
        logits = model(**inputs).logits[:, 0].tolist()
    prompts, completions = ["the", "the", "the"], [text[3:] for text in texts]
    assert logits == pytest.approx(result.reward_model(prompts, completions), abs=1e-5)
    page = (run / "report.html").read_text("utf-8")
    assert f"{result.eval_after['accuracy']:.4g}" in page and 'aria-label="accuracy,' in page
    with pytest.raises(Refused, match="already holds a run"):
        train_reward_model(data=rows_to_learn(), model=str(saved()), output_dir=run, **options)


def test_a_task_makes_its_own_preferences_at_the_width_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    options = {"task": "vowels", "num_pairs": 60, "eval_size": 20, "max_steps": 2, "quiet": True}
    result = train_reward_model(
        output_dir=tmp_path / "run", hidden_size=16, noise_temperature=1.0, **options
    )
    file = tmp_path / "run" / "preferences.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert 40 < len(rows) <= 60 and "chosen_gold" in rows[0]
    assert 0.5 <= result.eval_after["noise_ceiling"] < 1
    # its own pairs, read back from the file, with the same backbone
    other = train_reward_model(output_dir=tmp_path / "b", data=str(file), hidden_size=16, **options)
    widths = [one.reward_model.model.config.hidden_size for one in (result, other)]
    assert widths == [16, 16]
    with pytest.raises(Refused, match="hidden_size=18 does not fit"):
        train_reward_model(output_dir=tmp_path / "c", hidden_size=18, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "--data FILE.*--task NAME"),
        ({"model": None}, "--model DIRECTORY_OR_HUB_NAME"),
        ({"model": "no/such/model"}, "There is no directory 'no/such/model'"),
        ({"data": [GOOD, GOOD | {"chosen": "cat " * 200}] * 4}, "3 of 7 pairs.*64 tokens"),
        (
            {"data": [GOOD | {"margin": 1.0}] * 4, "margin": 0.5},
            "a column 'margin' were both given",
        ),
        ({"hidden_size": 16}, "leave out one of both"),
        ({"max_step": 3}, "no setting 'max_step'. Did you mean 'max_steps'"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, words, tmp_path, saved):
    given = {
        "data": [GOOD] * 8,
        "model": str(saved()),
        "output_dir": tmp_path / "run",
        "quiet": True,
    }
    with pytest.raises(Refused, match=words):
        train_reward_model(**given | changes)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    judge = untrained()
    options = {"data": rows_to_learn(20), "model": (judge.model, judge.tokenizer), "quiet": True}
    center = {"margin": 1e30, "center_rewards_coefficient": 1e30}
    with torch.no_grad():
        judge.model.score.weight.mul_(1e6)
    with pytest.raises(Stopped, match="loss of the reward model is inf at step 1"):
        train_reward_model(output_dir=tmp_path / "run", **center, **options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exit_reason"] == "failed" and "inf" in summary["error"]
    with torch.no_grad():
        judge.model.score.weight.fill_(math.nan)
    with pytest.raises(Refused, match=r"Before the first step: 8 of 8 rewards are not finite"):
        train_reward_model(output_dir=tmp_path / "other", **options)
    assert "failed" in report_from_directory(tmp_path / "run").read_text("utf-8")


def test_a_training_that_is_saved_and_loaded_continues(tmp_path):
    args = RewardModelArguments(
        max_steps=7, batch_size=2, learning_rate=0.01, eval_every=1, weight_decay=0.1
    )
    judges = [untrained() for _ in range(2)]
    whole, part = (PreferenceTraining(judge, PAIRS, args) for judge in judges)
    for _ in range(4):
        whole.update()
    state, weights = (through_a_checkpoint(x.state_dict()) for x in (whole, judges[0].model))
    part.load_state_dict(state)
    judges[1].model.load_state_dict(weights)
    for _ in range(4, 7):
        assert equal(part.update(), whole.update())
    assert equal(part.state_dict(), whole.state_dict())
    assert equal(*(dict(judge.model.state_dict()) for judge in judges))
    with pytest.raises(Refused, match="num_rows 3 and this run has 2"):
        PreferenceTraining(judges[1], PAIRS[:2], args).load_state_dict(state)


def test_chat_preferences_are_scored_as_the_reward_is():
    judge, asked = untrained(kind="chat"), [{"role": "user", "content": "the cat"}]
    good, bad = ([*asked, {"role": "assistant", "content": text}] for text in ("sat", "dog dog"))
    scores = score_pairs(
        judge, encode_pairs(judge, read_pairs([{"chosen": good, "rejected": bad}], "data"))
    )
    assert scores[0].tolist() == pytest.approx(judge([asked] * 2, ["sat", "dog dog"]), abs=1e-6)
    assert isinstance(judge, RewardModel) and scores[0, 0] != scores[0, 1]
