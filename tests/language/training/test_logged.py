"""Logged rows: what they do to a step and its expectation, what is read of them, and what they leave alone."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from refusals import refused
from tiny_models import (
    LETTERS,
    PROMPTS,
    apart,
    gradient,
    letter_task,
    letters,
    letters_trained,
    make_learner,
    make_policy,
    make_task,
    one_step,
)

import tokenrl
from tokenrl.core import Estimator
from tokenrl.lab.compare.equality import check_equal
from tokenrl.language.policy.model import wrap
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.stream import RowOrder, prompt_orders
from tokenrl.language.tasks.task import own_task
from tokenrl.language.training.log import read_log
from tokenrl.language.training.logged import LoggedPrompts, make_log
from tokenrl.runs.metrics import read_completions
from tokenrl.runs.reader import read_run

TEXTS = ["", "a", "bc", "dab", "cc", "d", "abd", "ba"]


def logs(prompts=LETTERS, texts=TEXTS, **columns):
    """Rows of somebody else; a column is a function of the text."""
    return [
        {"prompt": prompt, "completion": text, **{name: f(text) for name, f in columns.items()}}
        for prompt in prompts
        for text in texts
    ]


def chances(text):
    """Log-probabilities of each letter and of the end, which somebody might have."""
    return [-0.5 - 0.3 * place for place in range(len(text) + 1)]


def letter_reward(completions, **_):
    return [text.count("a") + 0.1 * len(text) for text in completions]


def stream_of(learner, task, rows, share=1.0):
    """What draws the prompts and the logged rows of a learner's steps."""
    learner.args = replace(learner.args, rows=rows, rows_share=share)
    log = make_log(read_log(learner.args), task, learner, Rewards(task.reward))
    return LoggedPrompts(task.train_prompts, 0, log)


def logprobs_of(model, prompt, ids):
    """Log-probabilities of each token of a completion, by a plain forward pass in the model's precision."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(ids)), ids]


@pytest.mark.parametrize(("importance", "is_exact"), [("sequence", True), ("token", False)])
def test_over_all_logs_of_a_sampler_the_mean_gradient_is_that_of_the_expected_reward(
    importance, is_exact
):
    """A sampler that draws each completion equally often: all ordered pairs, once each, are its expectation."""
    model, tokenizer = letters()
    policy = wrap(model.double(), tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    end, count = policy.ends[0], len(model.lm_head.weight)
    others = [i for i in range(count) if i != end]
    texts = [[end], *(map(list, product(others, range(count))))]
    worth = {tuple(ids): float(torch.tensor(ids).double().add(1).sin().sum()) for ids in texts}
    chance = torch.tensor(float(len(texts))).double().log()
    rows = [
        {
            "prompt": "ab>",
            "completion_ids": ids,
            "logprobs": [-float(chance) * part for part in ([0.3, 0.7] if len(ids) > 1 else [1])],
            "reward": worth[tuple(ids)],
        }
        for ids in texts
    ]
    estimator = Estimator.preset("rloo", importance=importance)
    groups = len(texts) ** 2
    shape = {"num_generations": 2, "prompts_per_step": groups, "max_completion_length": 2}
    learner = make_learner(policy, estimator, **shape)
    stream = stream_of(learner, own_task(make_task(["ab>"] * 2)), rows)
    stream.log.groups = [[*pair] for pair in product(range(len(texts)), repeat=2)]
    stream.log.order = RowOrder(groups, 0, prompt_orders)
    exact = copy.deepcopy(model)
    one_step(learner, stream=stream)

    prompt = policy.encode("ab>")
    total = sum(logprobs_of(exact, prompt, ids).sum().exp() * worth[tuple(ids)] for ids in texts)
    (-total).backward()
    distance = apart(gradient(model), gradient(exact))
    # the norms of this model have 32 bits
    assert distance < 1e-6 if is_exact else distance > 0.1


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
def test_the_gradient_of_a_step_is_that_of_a_loop_over_its_rows(share, importance):
    policy = make_policy("gpt2", dtype="float64", initializer_range=0.1, vocabulary=90)
    learner = make_learner(policy, Estimator.preset("rloo", importance=importance))
    model = copy.deepcopy(policy.model)
    columns = {} if importance == "none" else {"logprobs": lambda text: None}
    rows = logs(PROMPTS, ["the", "mat on", "dog", "a cat"], **columns)
    for row in rows if columns else ():
        ids = policy.tokenizer(row["completion"]).input_ids
        row["logprobs"] = [-2.0 - 0.2 * (i % 5) for i in [*ids, 0]]
    record = one_step(learner, stream=stream_of(learner, own_task(make_task()), rows, share))
    of_step = record.rewarded
    assert of_step.of_log.tolist() == [False] * (6 if share < 1 else 0) + [True] * int(12 * share)
    recorded = {(row["prompt"], row["completion"]): row.get("logprobs") for row in rows}
    texts = policy.decode(of_step.completion_ids, of_step.mask)
    total = 0.0
    totals = of_step.rewards.view(-1, 3)
    advantages = (totals - (totals.sum(1, keepdim=True) - totals) / 2).flatten()
    for i, advantage in enumerate(advantages):
        prompt = of_step.prompt_ids[i, of_step.prompt_mask[i]].tolist()
        ids = of_step.completion_ids[i, of_step.mask[i]].tolist()
        logprobs = logprobs_of(model, prompt, ids)
        sampler = of_step.sampling_logprobs[i, : len(ids)]
        if of_step.of_log[i] and columns:
            sampler = torch.tensor(recorded[of_step.data[i]["prompt"], texts[i]]).double()
        gaps = logprobs.detach() - sampler
        if importance != "none":
            is_far = bool(gaps.abs().max() > 0.1)
            assert is_far == bool(of_step.of_log[i])
        weights = {"none": gaps * 0 + 1, "token": gaps.exp(), "sequence": gaps.sum().exp()}
        total = total - (weights[importance] * logprobs).sum() * advantage / len(advantages)
    total.backward()
    # the sampler's numbers of sampled rows have 32 bits
    assert apart(gradient(policy.model), gradient(model)) < 1e-5
    assert ("logged/kept_mass" in record.metrics) == (importance != "none")
    assert ("sampling/kept_mass" in record.metrics) == (share < 1)


def test_a_log_of_the_policy_itself_makes_the_step_that_it_was_sampled_in():
    results, rows = [], []
    for is_logged in (False, True):
        policy = make_policy("gpt2", dtype="float64", initializer_range=0.1, vocabulary=90)
        learner = make_learner(policy, Estimator.preset("rloo", importance="sequence"))
        stream = None
        if is_logged:
            stream = stream_of(learner, own_task(make_task()), rows)
        record = one_step(learner, stream=stream)
        results.append(gradient(policy.model))
        taken = record.rewarded
        rows = [
            {
                "prompt": row["prompt"],
                "completion_ids": taken.completion_ids[i, taken.mask[i]].tolist(),
                "logprobs": taken.sampling_logprobs[i, taken.mask[i]].tolist(),
            }
            for i, row in enumerate(taken.data)
        ]
    assert apart(*results) < 1e-6


def test_what_a_run_samples_and_what_is_logged_are_counted_apart(tmp_path, said):
    rows = logs(reward=lambda text: 9.0 if text == "dab" else None if text == "a" else 0.0)
    task = letter_task(letter_reward, eval_prompts=[{"prompt": LETTERS[0]}, {"prompt": "dd>"}])
    shape = {"rows": rows, "rows_share": 0.5, "log_completions": 1, "stop_at_reward": 8}
    run = letters_trained(tmp_path / "half", task, **shape)
    table = read_completions(run.output_dir / "completions/step_000003.parquet")
    assert [row["logged"] for row in table] == [False] * 8 + [True] * 8
    assert run.exit_reason == "finished" and run.completions_until_solved is None
    assert run.best_completions and max(row["reward"] for row in run.best_completions) < 8
    assert [row["num_samples"] for row in run.metrics[1:]] == [8, 16, 24]
    first = read_completions(run.output_dir / "completions/step_000001.parquet")
    rewards = [row["reward"] for row in first if row["reward"] is not None]
    metrics = run.metrics[1]
    assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert metrics["rewards/letter_reward/abstained"] == 0
    own = [row["rewards/letter_reward"] for row in first[:8]]
    assert metrics["rewards/letter_reward/mean"] == pytest.approx(sum(own) / 8)
    assert metrics["frac_rows_abstained"] == 1 - len(rewards) / 16

    options = {"rows": str(tmp_path / "half"), "num_generations": 1, "estimator": "reinforce"}
    again = letters_trained(tmp_path / "again", task, quiet=False, **options)
    text = " ".join(said().split())
    assert " groups of 1 rows" in text and "biased, as nothing corrects" in text
    assert "the reward-weighted likelihood of the rows" in text
    assert (
        again.metrics[-1]["num_samples"] == 0
        and "rewards/letter_reward/mean" not in (again.metrics[1])
    )


def test_rows_are_the_task_where_none_is_named_and_held_out_prompts_are_not_learnt(tmp_path):
    rows = logs(tag=len, logprobs=chances)
    shape = {"max_steps": 9, "prompts_per_step": 4, "num_generations": 4, "log_completions": 1}
    run = tokenrl.train(
        model=letters(),
        rows=rows,
        reward=letter_reward,
        estimator="rloo,importance=sequence",
        max_completion_length=4,
        output_dir=tmp_path / "run",
        cpu=True,
        quiet=True,
        **shape,
    )
    config = json.loads((run.output_dir / "config.json").read_text())
    assert config["rows"].startswith("in-memory:") and config["task"].startswith("in-memory:")
    learnt = set()
    for step in range(1, 10):
        path = run.output_dir / f"completions/step_{step:06d}.parquet"
        learnt |= {row["prompt"] for row in read_completions(path)}
    assert 8 < len(learnt) < len(LETTERS)
    epochs = [row["epoch"] for row in run.metrics[1:]]
    assert epochs == pytest.approx([4 * step / (2 * len(learnt)) for step in range(1, 10)])


def test_arms_may_differ_in_their_logs_and_runs_of_an_arm_may_not(tmp_path):
    task = letter_task(letter_reward)
    runs = []
    for name, texts in (("a", TEXTS), ("b", TEXTS[1:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, logs(texts=texts))))
        letters_trained(tmp_path / name, task, rows=str(path))
        runs.append(read_run(tmp_path / name))
    assert check_equal([("a", runs[0]), ("b", runs[1])]) is None
    with refused("they differ in rows"):
        check_equal([("a", runs[0]), ("a", runs[1])])
    path = str(tmp_path / "a.jsonl")
    Path(path).write_text((tmp_path / "b.jsonl").read_text())
    letters_trained(tmp_path / "d", task, rows=path)
    with refused("they differ in hash of rows"):
        check_equal([("a", runs[0]), ("a", read_run(tmp_path / "d"))])
    with refused("The run was started otherwise: rows"):
        letters_trained(tmp_path / "a", task, rows=path, resume="auto")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder"])
def test_rows_are_read_alike_from_files(tmp_path, kind):
    rows = logs(LETTERS[:4], TEXTS[1:], logprobs=chances, reward=len)
    rows[1]["reward"] = None
    path = tmp_path / f"log.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path = tmp_path / "log.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    source = str(tmp_path) if kind == "folder" else str(path)
    tables = []
    for data in (rows, source):
        model, tokenizer = letters()
        learner = make_learner(wrap(model, tokenizer), num_generations=2, prompts_per_step=2)
        tables.append(stream_of(learner, own_task(letter_task(letter_reward)), data).log)
    here, there = tables
    assert torch.equal(here.table.completion_ids, there.table.completion_ids)
    assert torch.equal(here.table.sampling_logprobs, there.table.sampling_logprobs)
    assert here.rewards.isnan().sum() == 1 and here.groups == there.groups
    assert torch.equal(here.rewards.nan_to_num(-1), there.rewards.nan_to_num(-1))


def test_rows_are_left_out_in_words_and_texts_that_read_otherwise_are_told(tmp_path, said):
    rows = logs(texts=[*TEXTS, "abcda", "é", "abcd"], truncated=lambda text: text == "abcd")
    letters_trained(tmp_path, letter_task(letter_reward), rows=rows, quiet=False)
    text = " ".join(said().split())
    assert "16 longer than 4 tokens or than the context, 32 that fill no group of 4" in text
    assert "16 of 160 logged completions read otherwise" in text


def test_a_log_that_is_far_from_the_policy_is_told_once(tmp_path, said):
    rows = logs(logprobs=lambda text: [-9.0 * (text == "ba") - 0.01] * (len(text) + 1))
    options = {"estimator": "rloo,importance=sequence", "max_steps": 6, "quiet": False}
    run = letters_trained(tmp_path, letter_task(letter_reward), rows=rows, **options)
    shares = [row["logged/effective_sample_size"] for row in run.metrics[1:]]
    text = " ".join(said().split())
    windows = [sum(shares[start : start + 3]) / 3 for start in range(4)]
    assert windows[0] > 0.1 > min(windows)
    assert text.count("the log is too far from the policy") == 1
    assert "exact_for_policy in the first pass over the rows" in text


def test_rows_get_the_columns_of_the_task_that_they_lack():
    model, tokenizer = letters()
    task = letter_task(letter_reward)
    task.train_prompts = [{"prompt": p, "answer": p[::-1], "note": "task"} for p in LETTERS]
    rows = logs(LETTERS[:2], note=lambda text: "row" if text == "a" else None)
    learner = make_learner(wrap(model, tokenizer), num_generations=2, prompts_per_step=2)
    data = stream_of(learner, own_task(task), rows).log.data
    assert data[0] == {"prompt": LETTERS[0], "answer": LETTERS[0][::-1], "note": "task"}
    assert data[1]["note"] == "row"


def test_the_policy_of_the_start_stands_in_for_a_sampler(tmp_path):
    rows = logs(logprobs=lambda text: [-1.0])  # which is not read
    options = {"estimator": "rloo,importance=sequence", "rows_sampler": "start"}
    run = letters_trained(tmp_path, letter_task(letter_reward), rows=rows, **options)
    shares = [row["logged/effective_sample_size"] for row in run.metrics[1:]]
    assert shares[0] == pytest.approx(1) and shares[2] < 0.9999


def one(**changes):
    """A log with a row that differs from the others."""
    rows = logs(logprobs=chances)
    rows[5] = {**rows[5], **changes}
    return rows


SEQUENCE = "rloo,importance=sequence"
REFUSALS = [
    ({"rows": []}, "is empty: give at least one row"),
    ({"rows": "nothing.jsonl"}, "there is no such file"),
    (
        {"rows": [{"prompt": "ab>", "text": "a"}]},
        "has no column 'completion', nor 'completion_ids'",
    ),
    ({"rows": [{"completion": "a"}]}, "has no column 'prompt'"),
    ({"rows": one(completion_ids=[99])}, "row 5: completion_ids must be a list of whole numbers"),
    ({"rows": one(completion_ids=[])}, "row 5: its completion has no token"),
    ({"rows": one(logprobs=[-0.1])}, "row 5: it has 1 logprobs and 2 tokens, its end included"),
    ({"rows": one(logprobs=[-0.1, 0.2])}, "row 5: logprobs must be a list of numbers"),
    ({"rows": one(logprobs=None)}, "1 of 128 rows have no logprobs"),
    ({"rows": one(reward="good")}, "row 5: its reward is 'good'"),
    ({"rows": one(reward=float("nan"))}, "row 5: its reward is nan"),
    ({"rows": logs(texts=["abcdabcd"])}, "128|16 longer than 4 tokens"),
    ({"rows": logs(texts=["a"])}, "16 that fill no group of 4"),
    ({"rows": logs(), "estimator": SEQUENCE}, "importance 'sequence' reads the log-probabilities"),
    ({"rows": logs(), "allowed": "a*"}, "together with allowed"),
    ({"rows": logs(), "sync_every": 2}, "together with sync_every"),
    ({"rows": logs(), "replay": 2}, "together with replay"),
    ({"rows": logs(), "top_k": 3}, "together with top_k, top_p or min_p"),
    ({"rows": logs(), "prompt_weights": "variance"}, "together with prompt_weights"),
    ({"rows": logs(), "estimator": "dapo"}, "together with zero_spread refill"),
    ({"rows": logs(), "estimator": "rloo,importance_centre=True"}, "with importance_centre"),
    ({"rows": logs(reward=len), "estimator": "remax"}, "together with baseline remax"),
    ({"rows": logs(reward=len), "estimator": "rloo,components=separate"}, "components separate"),
]


@pytest.mark.parametrize(("options", "words"), REFUSALS, ids=[words for _, words in REFUSALS])
def test_what_cannot_be_learnt_is_refused_in_words(tmp_path, options, words):
    with refused(words):
        letters_trained(tmp_path, letter_task(letter_reward), **options)


def test_greedy_completions_of_logged_prompts_are_rewarded():
    policy = make_policy("gpt2", dtype="float64", initializer_range=0.1, vocabulary=90)
    learner = make_learner(policy, "remax")
    rows = logs(PROMPTS, ["the", "mat on", "dog"])
    record = one_step(learner, stream=stream_of(learner, own_task(make_task()), rows))
    greedy = record.rewarded.greedy_rewards
    assert record.rewarded.of_log.all() and not greedy.isnan().any()
