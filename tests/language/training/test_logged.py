"""Logged rows: what they do to a step and its expectation, what is read of them, and what they leave alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import product

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

from tokenrl.core import Estimator
from tokenrl.language.policy.model import wrap
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import own_task
from tokenrl.language.training.logged import logged_groups, read_log
from tokenrl.runs.metrics import read_completions

TEXTS = ["", "a", "bc", "dab", "cc", "d", "abd", "ba"]


def logs(prompts=LETTERS, texts=TEXTS, **columns):
    """Rows of somebody else; a column is a function of the text."""
    return [
        {"prompt": prompt, "completion": text, **{name: f(text) for name, f in columns.items()}}
        for prompt in prompts
        for text in texts
    ]


def letter_reward(completions, **_):
    return [text.count("a") + 0.1 * len(text) for text in completions]


def learning_from(learner, task, rows, share=1.0):
    """A learner whose steps take rows of a log, and what draws the prompts of the others."""
    task = own_task(task)
    learner.args = replace(learner.args, rows=rows, rows_share=share, task="mine")
    read = read_log(learner.args, task, False)
    learner.log = logged_groups(read, learner, Rewards(task.reward), print)
    return {"stream": PromptStream(task.train_prompts, 0)}


def logprobs_of(model, prompt, ids):
    """Log-probabilities of each token of a completion, by a plain forward pass in the model's precision."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(ids)), ids]


def test_over_all_logs_of_a_sampler_the_mean_gradient_is_that_of_the_expected_reward():
    """A sampler that draws each completion equally often: all ordered pairs, once each, are its expectation."""
    model, tokenizer = letters()
    policy = wrap(model.double(), tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    prompt, end = policy.encode("ab>"), policy.ends[0]
    ids = range(len(model.lm_head.weight))
    texts = [[end], *([i, k] for i in ids if i != end for k in ids)]
    worth = [math.sin(sum(text)) for text in texts]
    rows = [
        {
            "prompt": "ab>",
            "completion_ids": text,
            "logprobs": [-math.log(len(texts)) / len(text)] * len(text),
            "reward": reward,
            "encoded": (prompt, text),
        }
        for text, reward in zip(texts, worth, strict=True)
    ]
    pairs = [*product(range(len(texts)), repeat=2)]
    shape = {"num_generations": 2, "prompts_per_step": len(pairs), "max_completion_length": 2}
    learner = make_learner(policy, Estimator.preset("rloo", importance="sequence"), **shape)
    options = learning_from(learner, make_task(["ab>"] * 2), rows)
    learner.log = PromptStream([Rows.of(rows).take(pair) for pair in pairs], 0)
    exact = copy.deepcopy(model)
    one_step(learner, **options)
    chances = [logprobs_of(exact, prompt, text).sum().exp() for text in texts]
    (-sum(chance * reward for chance, reward in zip(chances, worth, strict=True))).backward()
    # the norms of this model have 32 bits
    assert apart(gradient(model), gradient(exact)) < 1e-6


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
def test_the_gradient_of_a_step_is_that_of_a_loop_over_its_rows(share, importance):
    policy = make_policy("gpt2", dtype="float64", initializer_range=0.1, vocabulary=90)
    learner = make_learner(policy, Estimator.preset("rloo", importance=importance))
    model = copy.deepcopy(policy.model)
    rows = logs(PROMPTS, ["the", "mat on", "dog", "a cat"])
    for row in rows if importance != "none" else ():
        ids = policy.tokenizer(row["completion"]).input_ids
        row["logprobs"] = [-2.0 - 0.2 * (i % 5) for i in [*ids, policy.ends[0]]]
    record = one_step(learner, **learning_from(learner, make_task(), rows, share))
    of_step = record.rewarded
    own = 12 - int(12 * share)
    assert of_step.sampled.tolist() == [True] * own + [False] * (12 - own)
    total = 0.0
    totals = of_step.rewards.view(-1, 3)
    advantages = (totals - (totals.sum(1, keepdim=True) - totals) / 2).flatten()
    for i, advantage in enumerate(advantages):
        prompt = of_step.prompt_ids[i, of_step.prompt_mask[i]].tolist()
        ids = of_step.completion_ids[i, of_step.mask[i]]
        logprobs = logprobs_of(model, prompt, ids.tolist())
        sampler = logprobs.detach() if i < own else -2 - 0.2 * (ids % 5).double()
        gaps = logprobs.detach() - sampler
        weights = {"none": 1, "token": gaps.exp(), "sequence": gaps.sum().exp()}
        total = total - (weights[importance] * logprobs).sum() * advantage / len(advantages)
    total.backward()
    # the sampler's numbers of sampled rows have 32 bits
    assert apart(gradient(policy.model), gradient(model)) < 1e-5
    gap = record.metrics.get("sampling/logp_difference/max", math.nan)
    # those of an unknown sampler count nowhere
    assert (gap > 0.1) == (importance != "none") and math.isnan(gap) == (
        own == 0 and importance == "none"
    )


def test_what_a_run_samples_and_what_is_logged_are_counted_apart(tmp_path, said):
    rows = logs(reward=lambda text: 9.0 if text == "dab" else None if text == "a" else 0.0)
    task = letter_task(letter_reward, LETTERS[1:], eval_prompts=[{"prompt": LETTERS[0]}])
    shape = {"rows": rows, "rows_share": 0.5, "log_completions": 1, "stop_at_reward": 8}
    run = letters_trained(tmp_path / "half", task, **shape)
    tables = [read_completions(path) for path in sorted(run.output_dir.glob("completions/*"))]
    assert [[row["logged"] for row in table] for table in tables] == [[False] * 8 + [True] * 8] * 3
    assert LETTERS[0] not in {row["prompt"] for table in tables for row in table}
    assert run.exit_reason == "finished" and run.completions_until_solved is None
    assert run.best_completions and max(row["reward"] for row in run.best_completions) < 8
    assert [row["num_samples"] for row in run.metrics[1:]] == [16, 32, 48]
    rewards = [row["reward"] for row in tables[0] if row["reward"] is not None]
    assert run.metrics[1]["reward"] == pytest.approx(sum(rewards) / len(rewards))

    # The tables are a log themselves, of what the policy has sampled.
    options = {"rows": str(run.output_dir / "completions"), "num_generations": 1}
    letters_trained(tmp_path / "again", task, quiet=False, **options, estimator="reinforce")
    text = " ".join(said().split())
    assert "groups of 1, of 24 rows" in text
    assert "biased, as the reward-weighted likelihood of the rows is ascended" in text


def test_rows_are_left_out_in_words(tmp_path, said):
    rows = logs(texts=[*TEXTS, "abcda", "é", "abcd"], truncated=lambda text: text == "abcd")
    letters_trained(tmp_path, letter_task(letter_reward), rows=rows, quiet=False)
    text = " ".join(said().split())
    assert "32 groups of 4, of 176 rows" in text and "32 are longer than 4 tokens or read" in text


def test_a_log_that_is_far_from_the_policy_is_told_once(tmp_path, said):
    rows = logs(logprobs=lambda text: [-9.0 * (text == "ba") - 0.01] * (len(text) + 1))
    options = {"estimator": "rloo,importance=sequence", "max_steps": 6, "quiet": False}
    run = letters_trained(tmp_path, letter_task(letter_reward), rows=rows, **options)
    assert min(row["sampling/effective_sample_size"] for row in run.metrics[1:]) < 0.1
    text = " ".join(said().split())
    assert text.count("the log is too far from the policy") == 1
    assert "exact_for_policy in the first pass over the rows" in text


def one(**changes):
    """A log with a row that differs from the others."""
    rows = logs(logprobs=lambda text: [-0.5] * (len(text) + 1))
    rows[5] = {**rows[5], **changes}
    return rows


SEQUENCE = "rloo,importance=sequence"
REFUSALS = [
    ({"rows": []}, "is empty: give at least one row"),
    ({"rows": "nothing.jsonl"}, "there is no such file"),
    ({"rows": "in-memory:0"}, "'in-memory:0' was data given from Python: give it again"),
    ({"rows": logs(), "control_arm": "random"}, "with a control arm"),
    ({"rows": [{"prompt": "ab>", "text": "a"}]}, "with no column completion"),
    ({"rows": [{"completion": "a"}]}, "has no column 'prompt'"),
    ({"rows": one(completion_ids=[99])}, "row 5: these are no values of a sampled completion"),
    ({"rows": one(logprobs=[-0.1])}, "row 5: .*2 tokens"),
    ({"rows": one(logprobs=[-0.1, 0.2])}, "row 5: .*.2 tokens"),
    ({"rows": one(logprobs=None), "estimator": SEQUENCE}, "and 1 without logprobs"),
    ({"rows": one(reward="good")}, "row 5: these are no values"),
    ({"rows": logs(texts=["abcdabcd"])}, "0 groups of 4, of 16 rows"),
    ({"rows": logs(), "estimator": SEQUENCE}, "importance 'sequence', which reads the log-prob"),
    ({"rows": logs(), "allowed": "a*"}, "with allowed"),
    ({"rows": logs(), "top_k": 3}, "with top_k, top_p or min_p"),
    ({"rows": logs(), "estimator": "dapo"}, "with zero_spread refill"),
    ({"rows": logs(), "estimator": "rloo,importance_centre=True"}, "with importance_centre"),
    ({"rows": logs(), "estimator": "remax"}, "with a baseline of yours or remax"),
]


@pytest.mark.parametrize(("options", "words"), REFUSALS, ids=[words for _, words in REFUSALS])
def test_what_cannot_be_learnt_is_refused_in_words(tmp_path, options, words):
    with refused(words):
        letters_trained(tmp_path, letter_task(letter_reward), **options)
