"""Every number of an evaluation and of a probe again from the completions, the KL from plain passes."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from refusals import refused
from tiny_models import Engine, textbook_logprobs

from tokenrl.language.commands.evaluate import paired_differences
from tokenrl.language.evaluation.estimates import best_of, over_prompts
from tokenrl.language.evaluation.evaluation import SCORED_AT_ONCE, Evaluator, evaluate_policy
from tokenrl.language.policy.model import wrap
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling
from toy_tasks.models import TinyModel

ROWS = [{"prompt": f"{x}{y}>"} for x in "abcd" for y in "ab"]


def tiny(seed: int = 0, letters: str = "abcd>", context: int = 16):
    model = TinyModel(tuple(letters), layers=1, hidden=16, heads=2, context=context)
    return wrap(*model(seed), source="tiny")


class Recorder:
    """Rewards that remember what they were asked: 0 or 1, and a graded one that sometimes abstains."""

    def __init__(self):
        self.ids, self.prompts = [], []

    def right(self, prompts, completions, completion_ids):
        self.prompts += prompts
        self.ids += completion_ids
        return right_reward(completions)

    def graded(self, completions):
        return [None if "d" in text else len(text) / 2 for text in completions]


Recorder.right.binary = True


def evaluate(functions, policy=None, *, mark=None, generations=6, how=None, k=(), **options):
    sampling = Sampling(4, generations, **how or {})
    rewards = Rewards(functions, pass_threshold=mark)
    return evaluate_policy(policy or tiny(), ROWS, rewards, sampling, k=k, **options).metrics


def right_reward(completions):
    return [float("a" in text) for text in completions]


def test_every_metric_is_that_of_the_completions():
    seen = Recorder()
    metrics = evaluate(seen.right, k=(6, 1, 2, 2))
    ids = seen.ids[len(ROWS) :]  # the greedy ones come first
    a = tiny().tokenizer.convert_tokens_to_ids("a")
    right = np.array([a in completion for completion in ids]).reshape(-1, 6)  # [B, G]
    assert 0.1 < right.mean() < 0.9
    for k in (1, 2, 6):
        each = [np.mean([any(subset) for subset in combinations(row, k)]) for row in right]
        assert metrics[f"pass@{k}"] == pytest.approx(np.mean(each))
        assert metrics[f"pass@{k}_stderr"] == pytest.approx(
            np.std(each, ddof=1) / math.sqrt(len(ROWS))
        )
    assert metrics["pass@1"] == pytest.approx(metrics["reward"]) and "best@1" not in metrics
    greedy = [float(a in completion) for completion in seen.ids[: len(ROWS)]]
    assert metrics["reward_greedy"] == pytest.approx(np.mean(greedy))
    assert metrics["reward_greedy_stderr"] == pytest.approx(
        np.std(greedy, ddof=1) / math.sqrt(len(ROWS))
    )
    assert metrics["completions/mean_length"] == pytest.approx(np.mean([len(row) for row in ids]))
    cold = evaluate(seen.right, how={"temperature": 1e-3})
    assert cold["entropy"] < 0.01 < metrics["entropy"]
    alone = evaluate(Recorder().right, generations=0)  # of the greedy completions
    assert {
        "reward_greedy",
        "reward_greedy_stderr",
        "rewards/right/mean",
        "entropy",
    } <= alone.keys()
    assert not {"reward", "kl"} & alone.keys()
    assert not any(name.startswith(("pass@", "best@")) for name in alone)


def test_only_a_declaration_or_a_threshold_says_what_is_right():
    """The total of `right` and of 1 minus something is 0 or 1 too, and 1 for a wrong answer."""

    def consoled(completions):
        return [0.0 if "a" in text else 1.0 for text in completions]

    def graded(completions):
        return [0.25 * text.count("a") for text in completions]

    metrics = evaluate([Recorder().right, consoled], k=(1, 6))
    assert metrics["reward"] == metrics["best@6"] == 1.0 and metrics["rewards/right/mean"] < 0.9
    assert metrics["rewards/consoled/mean"] == pytest.approx(1 - metrics["rewards/right/mean"])
    undeclared = evaluate([right_reward], k=(1, 6))
    assert (
        not any(name.startswith("pass@") for name in (*metrics, *undeclared))
        and "best@6" in undeclared
    )
    metrics = evaluate([graded], mark=0.5, k=(1,))
    right = evaluate(
        [lambda completions: [float(text.count("a") >= 2) for text in completions]], k=(1,)
    )
    assert 0 < metrics["pass@1"] == right["reward"] < metrics["best@1"] + metrics["pass@1"]
    assert metrics["best@1"] == pytest.approx(metrics["reward"]) != metrics["pass@1"]


def test_values_by_prompt_average_to_the_metrics_and_pair_two_policies():
    sampling = Sampling(4, 6)
    rewards = Rewards([Recorder().right, lambda completions: [t.count("b") for t in completions]])
    options = {"k": (1, 3), "reference": tiny(2)}
    first, other = (evaluate_policy(tiny(s), ROWS, rewards, sampling, **options) for s in (0, 1))
    for name, values in other.by_prompt.items():
        assert len(values) == len(ROWS) and np.mean(values) == pytest.approx(other.metrics[name]), (
            name
        )
    assert {"reward_greedy", "reward", "best@3", "kl"} <= other.by_prompt.keys()
    compared = paired_differences(first.by_prompt, other.by_prompt)
    assert len(compared) == 2 * len(other.by_prompt)
    apart = np.array(other.by_prompt["best@3"]) - np.array(first.by_prompt["best@3"])
    assert compared["difference/best@3"] == pytest.approx(apart.mean()) != 0
    assert compared["difference/best@3_stderr"] == pytest.approx(
        apart.std(ddof=1) / math.sqrt(len(ROWS))
    )
    same = paired_differences(first.by_prompt, first.by_prompt)
    assert set(same.values()) == {0.0}


def plain_logprobs(policy, prompt, ids, top_p):
    """[T, V] of one completion, by one forward pass over the whole text."""
    start = policy.encode(prompt)
    with torch.no_grad():
        logits = policy.model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1].double()
    return textbook_logprobs(logits, temperature=0.7, top_p=top_p)


def test_the_kl_to_a_reference_is_that_of_plain_forward_passes():
    policy, base, seen = tiny(0), tiny(1), Recorder()
    metrics = evaluate(seen.right, policy, reference=base, how={"temperature": 0.7, "top_p": 0.8})
    k1, k3, entropies = [], [], []
    for prompt, ids in zip(seen.prompts[len(ROWS) :], seen.ids[len(ROWS) :], strict=True):
        p, q = (
            plain_logprobs(model, prompt, ids, top_p) for model, top_p in ((policy, 0.8), (base, 1))
        )
        ratio = (p - q).gather(1, torch.tensor(ids)[:, None])
        k1.append(float(ratio.sum()))
        k3.append(float(((-ratio).exp() - 1 + ratio).sum()))
        assert p.isinf().any()
        entropies += (-(p.exp() * p.clamp(min=-99)).sum(-1)).tolist()
    for name, values in (("kl", k1), ("kl_k3", k3)):
        means = np.array(values).reshape(-1, 6).mean(axis=1)
        assert metrics[name] == pytest.approx(means.mean(), abs=1e-5)
        assert metrics[name + "_stderr"] == pytest.approx(
            means.std(ddof=1) / math.sqrt(len(means)), abs=1e-5
        )
    assert metrics["entropy"] == pytest.approx(np.mean(entropies), abs=1e-5)
    same = evaluate(seen.right, policy, reference=tiny(0))
    assert abs(same["kl"]) < 1e-5 and same["kl_stderr"] < 1e-5


@pytest.mark.parametrize(
    ("reference", "generations", "words"),
    [
        ({"letters": "abcde>"}, 6, "another vocabulary"),
        ({"letters": "abdc>"}, 6, "another vocabulary"),
        ({"context": 6}, 6, "The prompt '.*' has 3 tokens"),
        ({}, 0, "num_generations=0 samples none"),
    ],
)
def test_a_reference_that_cannot_score_is_refused(reference, generations, words):
    with refused(words):
        evaluate(Recorder().right, reference=tiny(1, **reference), generations=generations)


GRADED = np.array([0.5, -1.0, 2.0, 0.5, 0.5, 2.0])


@pytest.mark.parametrize("k", range(1, 7))
def test_the_best_of_k_is_a_mean_over_all_subsets(k):
    subsets = list(combinations(GRADED, k))
    assert best_of(GRADED, k) == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-12)
    assert math.isnan(best_of(GRADED[: k - 1], k))


def test_the_standard_error_is_over_prompts():
    metrics = over_prompts([1.0, 3.0, math.nan, 5.0])
    assert metrics.value == 3.0 and metrics.stderr == pytest.approx(2 / math.sqrt(3))
    assert math.isnan(over_prompts([1.0]).stderr) and math.isnan(over_prompts([math.nan]).value)


def test_what_another_engine_does_not_return_is_computed_some_rows_at_a_time():
    policy, sizes = tiny(), []
    expected, engine = evaluate(right_reward, policy, generations=8), Engine(policy)
    policy.model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    metrics = evaluate(right_reward, policy, generations=8, generator=engine)
    assert max(sizes) <= SCORED_AT_ONCE < 8 * len(ROWS)
    assert metrics == pytest.approx(expected, rel=1e-5)


class Talk:
    """Answers each turn with "ab" until a turn holds a d; a turn is worth the number of its letters a."""

    def reset(self, seed=None):
        return "b>", {}

    def step(self, text):
        return "ab", float(text.count("a")), "d" in text, False, {}


def test_of_episodes_what_the_policy_chose_is_measured_alone():
    rewards = Rewards([], environments=Environments(Talk, max_turns=3))
    policy, sampling = tiny(context=64), Sampling(9, 4)
    result = evaluate_policy(policy, ROWS, rewards, sampling)
    rows = Evaluator(policy, TransformersGenerator(policy)).rows(
        ROWS, rewards, sampling, "evaluation"
    )
    turns = [
        [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"] for row in rows
    ]
    assert {len(texts) for texts in turns} >= {1, 2} and any(
        "ab" in row["completion"] for row in rows
    )
    # a character is a token, and a turn has an EOS
    for row, texts in zip(rows, turns, strict=True):
        assert 0 < row["length"] <= len("".join(texts)) + len(texts)
    for row, each in zip(rows, turns, strict=True):  # a turn that was cut is not answered
        answered = each[:-1] if row["ending"] == "max_tokens" else each
        assert row["reward"] == "".join(answered).count("a")
    metrics = result.metrics
    assert metrics["completions/mean_length"] == pytest.approx(
        np.mean([row["length"] for row in rows])
    )
    assert metrics["episodes/turns"] == pytest.approx(np.mean(list(map(len, turns))))
    endings = [row["ending"] for row in rows]
    assert {"completed", "max_turns"} <= {*endings} <= {"completed", "max_turns", "max_tokens"}
    for ending in {*endings}:
        assert metrics[f"episodes/{ending}"] == pytest.approx(endings.count(ending) / len(rows))
    assert "episodes/error" not in metrics


class Failing(Talk):
    """An environment whose service is away."""

    def reset(self, seed=None):
        raise OSError("no connection")


def test_episodes_that_all_fail_are_evaluated_as_without_a_reward():
    rewards = Rewards([], environments=Environments(Failing))
    evaluation = evaluate_policy(tiny(), ROWS, rewards, Sampling(4, 2))
    assert evaluation.metrics["episodes/error"] == 1 and math.isnan(evaluation.metrics["reward"])
    assert "no connection" in evaluation.rows[0]["failure"]


def test_values_that_are_equal_but_for_rounding_have_no_error():
    for value in (0.1, 1 / 3, 1e9 / 7, 0.0):
        assert over_prompts([value] * 7).stderr == 0
    assert over_prompts([0.1 + 0.2 - 0.3, 0.0, 0.0]).stderr == 0
    assert over_prompts([0.1, 0.1 + 1e-9]).stderr > 0


def test_a_prompt_without_a_value_is_left_out_of_the_pairs():
    metrics = paired_differences(
        {"a": [1.0, math.nan, 3.0], "b": [1.0]}, {"a": [2.0, 5.0, 5.0], "c": [1.0]}
    )
    assert metrics == {"difference/a": 1.5, "difference/a_stderr": 0.5}
    assert paired_differences({"a": [1.0]}, {"a": [3.0]}) == {"difference/a": 2.0}
