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
from tokenrl.language.evaluation.evaluation import (
    SCORED_AT_ONCE,
    Evaluation,
    Evaluator,
    evaluate_policy,
)
from tokenrl.language.policy.model import wrap
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rewarded import completion_rows
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


def evaluate(functions, policy=None, *, mark=None, generations=6, k=(), reference=None, **how):
    rewards, policy = Rewards(functions, pass_threshold=mark), policy or tiny()
    sampling = Sampling(4, generations, **how)
    return evaluate_policy(policy, ROWS, rewards, sampling, k=k, reference=reference).metrics


def right_reward(completions):
    return [float("a" in text) for text in completions]


def mean_and_error(values):
    """The mean over prompts and its standard error."""
    values = np.array(values)
    return pytest.approx((values.mean(), values.std(ddof=1) / math.sqrt(len(values))), abs=1e-5)


def measured(metrics, name):
    return metrics[name], metrics[f"{name}_stderr"]


def test_an_answer_is_right_whose_rewards_add_up_to_the_mark_but_for_rounding():
    rewards = Rewards([lambda completions: [1.0] * len(completions)] * 3, (0.6, 0.3, 0.1))
    rewards.pass_threshold = 1.0  # their sum is below it
    metrics = evaluate_policy(tiny(), ROWS, rewards, Sampling(4, 2), k=(1,)).metrics
    assert metrics["reward"] < 1 == metrics["pass@1"]


def test_every_metric_is_that_of_the_completions():
    seen = Recorder()
    metrics = evaluate(seen.right, k=(6, 1, 2, 2))
    greedy, ids = seen.ids[: len(ROWS)], seen.ids[len(ROWS) :]
    a = tiny().tokenizer.convert_tokens_to_ids("a")
    right = np.array([a in completion for completion in ids]).reshape(-1, 6)  # [B, G]
    assert 0.1 < right.mean() < 0.9
    for k in (1, 2, 6):
        each = [np.mean([any(subset) for subset in combinations(row, k)]) for row in right]
        assert measured(metrics, f"pass@{k}") == mean_and_error(each)
    assert metrics["pass@1"] == pytest.approx(metrics["reward"]) and "best@1" not in metrics
    expected = mean_and_error([float(a in completion) for completion in greedy])
    assert measured(metrics, "reward_greedy") == expected
    assert metrics["completions/mean_length"] == pytest.approx(np.mean([len(row) for row in ids]))
    assert evaluate(seen.right, temperature=1e-3)["entropy"] < 0.01 < metrics["entropy"]
    alone = evaluate(Recorder().right, generations=0)  # of the greedy completions
    names = {"reward_greedy", "reward_greedy_stderr", "rewards/right/mean", "entropy"}
    assert names <= alone.keys() and not {"reward", "kl"} & alone.keys()
    assert not any(name.startswith(("pass@", "best@")) for name in alone)


def test_only_a_declaration_or_a_threshold_says_what_is_right():
    """The total of `right` and of 1 minus something is 0 or 1 too, and 1 for a wrong answer."""

    def consoled(completions):
        return [0.0 if "a" in text else 1.0 for text in completions]

    def graded(completions):
        return [0.25 * text.count("a") for text in completions]

    def twice(completions):
        return [float(text.count("a") >= 2) for text in completions]

    metrics = evaluate([Recorder().right, consoled], k=(1, 6))
    assert metrics["reward"] == metrics["best@6"] == 1.0 and metrics["rewards/right/mean"] < 0.9
    assert metrics["rewards/consoled/mean"] == pytest.approx(1 - metrics["rewards/right/mean"])
    undeclared = evaluate([right_reward], k=(1, 6))
    assert "best@6" in undeclared and not any("pass@" in name for name in (*metrics, *undeclared))
    metrics, right = evaluate([graded], mark=0.5, k=(1,)), evaluate([twice], k=(1,))
    assert 0 < metrics["pass@1"] == right["reward"] < metrics["best@1"] + metrics["pass@1"]
    assert metrics["best@1"] == pytest.approx(metrics["reward"]) != metrics["pass@1"]


def test_a_greedy_completion_that_different_prompts_share_is_told():
    def constant(*pairs):
        rows = [{"prompt": prompt, "completion": text} for prompt, text in pairs]
        return Evaluation({}, rows, {}, Sampling(max_completion_length=3)).constant

    assert constant(("a", "7"), ("b", "7")) == "'7'"
    assert constant(("a", ""), ("b", "")) == "''"
    assert constant(("a", "7"), ("b", "8")) == ""
    assert constant(("a", "7"), ("a", "7")) == constant(("a", "7")) == ""


def test_values_by_prompt_average_to_the_metrics_and_pair_two_policies():
    rewards = Rewards([Recorder().right, lambda completions: [t.count("b") for t in completions]])
    options = {"k": (1, 3), "reference": tiny(2)}
    first, other = (
        evaluate_policy(tiny(seed), ROWS, rewards, Sampling(4, 6), **options) for seed in (0, 1)
    )
    assert {"reward_greedy", "reward", "best@3", "kl"} <= other.by_prompt.keys()
    compared = paired_differences(first.by_prompt, other.by_prompt)
    for name, values in other.by_prompt.items():
        assert np.mean(values) == pytest.approx(other.metrics[name]) and len(values) == len(ROWS)
        difference = np.array(values) - np.array(first.by_prompt[name])
        assert measured(compared, f"difference/{name}") == mean_and_error(difference)
    assert compared["difference/best@3"] != 0
    assert {*paired_differences(first.by_prompt, first.by_prompt).values()} == {0.0}
    gaps = {"a": [1.0, math.nan, 3.0], "b": [1.0]}, {"a": [2.0, 5.0, 5.0], "c": [1.0]}
    assert paired_differences(*gaps) == {"difference/a": 1.5, "difference/a_stderr": 0.5}


def plain_logprobs(policy, prompt, ids, top_p):
    """[T, V] of one completion, by one forward pass over the whole text."""
    start = policy.encode(prompt)
    with torch.no_grad():
        logits = policy.model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1].double()
    return textbook_logprobs(logits, temperature=0.7, top_p=top_p)


def test_the_kl_to_a_reference_is_that_of_plain_forward_passes():
    policy, base, seen = tiny(0), tiny(1), Recorder()
    metrics = evaluate(seen.right, policy, reference=base, temperature=0.7, top_p=0.8)
    k1, k3, entropies = [], [], []
    for prompt, ids in zip(seen.prompts[len(ROWS) :], seen.ids[len(ROWS) :], strict=True):
        p, q = plain_logprobs(policy, prompt, ids, 0.8), plain_logprobs(base, prompt, ids, 1)
        ratio = (p - q).gather(1, torch.tensor(ids)[:, None])
        k1.append(float(ratio.sum()))
        k3.append(float(((-ratio).exp() - 1 + ratio).sum()))
        assert p.isinf().any()
        entropies += (-(p.exp() * p.clamp(min=-99)).sum(-1)).tolist()
    for name, values in (("kl", k1), ("kl_k3", k3)):
        expected = mean_and_error(np.array(values).reshape(-1, 6).mean(axis=1))
        assert measured(metrics, name) == expected
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
    # values that are equal but for rounding have no error
    assert over_prompts([1 / 3] * 7).stderr == over_prompts([0.1 + 0.2 - 0.3, 0.0, 0.0]).stderr == 0
    assert over_prompts([0.1, 0.1 + 1e-9]).stderr > 0


def test_what_another_engine_does_not_return_is_computed_some_rows_at_a_time():
    policy, sizes, sampling = tiny(), [], Sampling(4, 8)
    expected, engine = evaluate(right_reward, policy, generations=8), Engine(policy)
    policy.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    result = evaluate_policy(policy, ROWS, Rewards(right_reward), sampling, generator=engine)
    assert max(sizes) <= SCORED_AT_ONCE < 8 * len(ROWS)
    assert result.metrics == pytest.approx(expected, rel=1e-5)


class Talk:
    """Answers each turn with "ab" until a turn holds a d; a turn is worth the number of its letters a."""

    def reset(self, seed=None):
        return "b>", {}

    def step(self, text):
        return "ab", float(text.count("a")), "d" in text, False, {}


def test_of_episodes_what_the_policy_chose_is_measured_alone():
    rewards = Rewards([], environments=Environments(Talk, max_turns=3))
    policy, sampling = tiny(context=64), Sampling(9, 4)
    metrics = evaluate_policy(policy, ROWS, rewards, sampling).metrics
    evaluator = Evaluator(policy, TransformersGenerator(policy))
    table = evaluator.table(ROWS, rewards, sampling, "evaluation")
    rows = completion_rows(policy, table, rewards.names)
    lengths = table.mask.sum(dim=1).tolist()
    counts = []
    for row, length in zip(rows, lengths, strict=True):
        texts = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        counts.append(len(texts))
        # a character is a token, and a turn has an EOS
        assert 0 < length <= len("".join(texts)) + len(texts)
        if row["ending"] == "max_tokens":  # a turn that was cut is not answered
            texts.pop()
        assert row["reward"] == "".join(texts).count("a")
    assert {*counts} >= {1, 2} and any("ab" in row["completion"] for row in rows)
    expected = {
        "completions/mean_length": np.mean(lengths),
        "episodes/turns": np.mean(counts),
    }
    endings = [row["ending"] for row in rows]
    assert {"completed", "max_turns"} <= {*endings} <= {"completed", "max_turns", "max_tokens"}
    expected |= {f"episodes/{ending}": endings.count(ending) / len(rows) for ending in endings}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
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
