"""Prompts that are drawn by weights: their chances, the gradient of a step, and what a run remembers."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from refusals import refused
from tiny_models import (
    PROMPTS,
    apart,
    flat_second_prompt,
    gradient,
    letter_task,
    letters_trained,
    make_learner,
    make_policy,
    one_step,
    recorded,
    textbook,
)

from tokenrl.core.estimator import Estimator
from tokenrl.lab.exact.enumeration import exact_moments, prompt_chances_of
from tokenrl.lab.exact.problems import tabular_problem
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.stream import DECAY, PRIOR, WeightedPrompts
from tokenrl.language.training.arguments import TrainArguments

HARD = [3.0, 0.0, 1.0, 0.0]
ROWS = Rows.of([{"prompt": p, "hard": h} for p, h in zip(PROMPTS, HARD, strict=True)])


def test_chances_are_those_of_the_column_and_of_the_floor():
    stream = WeightedPrompts(ROWS, 0, "hard", 0.2)
    drawn = [PROMPTS.index(row["prompt"]) for _, row in stream.draw_prompts(4000)]
    expected = [0.05 + 0.8 * x for x in (0.75, 0, 0.25, 0)]
    assert np.bincount(drawn, minlength=4) / 4000 == pytest.approx(expected, abs=0.03)
    factors = stream.factors(torch.arange(4000))
    assert factors.tolist() == pytest.approx([1 / (4 * expected[row]) for row in drawn])
    assert float(factors.mean()) == pytest.approx(1, abs=0.1)  # so all prompts count the same
    assert stream.epoch == 1000


def by_hand(sums):
    """Chances of the four rows, half of them in proportion to the variance of what was seen."""
    count, total, squares = sums
    if not count.any():
        return np.full(4, 0.25)
    divisor = np.maximum(count, 1e-300)
    variance = squares / divisor - (total / divisor) ** 2
    typical = (variance * count).sum() / count.sum()
    weights = (count * variance + PRIOR * typical) / (count + PRIOR)
    return 0.125 + 0.5 * weights / weights.sum()


def test_what_is_remembered_makes_the_chances_of_the_next_pass_and_is_saved():
    stream = WeightedPrompts(ROWS, 3, "variance", 0.5)
    sums = np.zeros((3, 4))
    chances = {}  # of passes of four prompts
    rng = np.random.default_rng(0)
    for _ in range(9):  # three prompts in each step, most steps in two passes
        again = WeightedPrompts(ROWS, 3, "variance", 0.5)
        again.load_state_dict(stream.state_dict())
        prompts = stream.peek(3)
        assert prompts == again.draw_prompts(3) == stream.draw_prompts(3)
        names = [number for number, _ in prompts]
        for number in names:
            chances.setdefault(number // 4, by_hand(sums))
        rows = [PROMPTS.index(row["prompt"]) for _, row in prompts]
        expected = [1 / (4 * chances[n // 4][row]) for n, row in zip(names, rows, strict=True)]
        numbers = torch.tensor(names).repeat_interleave(2)
        assert again.factors(numbers)[::2].tolist() == pytest.approx(expected)
        rewards = torch.from_numpy(rng.random(6))
        metrics = stream.learn(numbers, rewards)
        assert stream.factors(numbers)[::2].tolist() == pytest.approx(expected)  # as it was drawn
        latest = chances[names[-1] // 4]
        assert metrics == {"prompts/effective": pytest.approx(1 / (latest**2).sum())}
        sums[:, rows] *= DECAY
        for row, reward in zip(np.repeat(rows, 2), rewards.tolist(), strict=True):
            sums[:, row] += (1, reward, reward**2)
    with refused("The saved order of the rows has seed 3 and this run has 4"):
        WeightedPrompts(ROWS, 4, "variance", 0.5).load_state_dict(stream.state_dict())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda *_: [1, 2], "must give 4 finite numbers of at least 0"),
        (lambda *_: [1, 2, 3, -1], "finite numbers of at least 0"),
        (lambda *_: [1, 2, 3, float("nan")], "finite numbers of at least 0"),
        (lambda *_: 1 / 0, "failed: .*ZeroDivisionError"),
        ("prompt", "prompt_weights failed: .*ValueError"),
        ("missing", "'missing'.*uniform, variance, prompt, hard"),
        ("nowhere.py:weights", "nowhere"),
    ],
    ids=["length", "negative", "nan", "error", "text", "no column", "no file"],
)
def test_weights_that_are_none_are_refused(weights, words):
    with refused(words):
        WeightedPrompts(ROWS, 0, weights, 0.5)


def learnt(weights, rewards, steps=1):
    """A stream after steps of all four prompts, each with these rewards."""
    stream = WeightedPrompts(ROWS, 0, weights, 0.5)
    for _ in range(steps):
        numbers = torch.tensor([number for number, _ in stream.draw_prompts(4)])
        values = torch.tensor(rewards * 4, dtype=torch.double)
        stream.learn(numbers.repeat_interleave(len(rewards)), values)
    return stream


def test_a_function_of_weights_gets_copies_and_gives_settings_back():
    def weights(*arrays):
        torch.set_default_dtype(torch.float64)
        for array in arrays:
            array += 1
        return arrays[0]

    moments = [learnt(x, [1.0, 2.0]).state_dict()["moments"] for x in (weights, "variance")]
    assert torch.equal(*moments) and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("shift", [0.0, 1e8, -1e12])
def test_the_variance_is_that_of_the_rewards_however_large_they_are(shift):
    seen = []
    learnt(lambda _, means, variances: seen.append(variances) or means * 0, [shift, shift + 1], 40)
    assert seen[-1] == pytest.approx([0.25] * 4, rel=1e-9)


@pytest.mark.parametrize("prompts", ["weighted", "inverse"])
def test_the_gradient_of_a_step_is_the_textbook_sum_over_drawn_prompts(prompts):
    policy = make_policy("gpt2", dtype="float64")
    before, seen = copy.deepcopy(policy.model), []
    estimator = Estimator(prompts=prompts)
    learner = make_learner(policy, estimator, prompt_weights="hard", micro_batch_size=5)
    stream = WeightedPrompts(ROWS, 5, "hard", 0.4)
    one_step(learner, reward=recorded(flat_second_prompt, seen), stream=stream)
    assert stream.position == 4 and len({prompt for prompt, *_ in seen}) < 4  # one came twice
    chance = dict(zip(PROMPTS, (0.1 + 0.6 * x / 4 for x in HARD), strict=True))
    rows = []
    for start in range(0, 12, 3):
        group = seen[start : start + 3]
        rewards = [reward for *_, reward in group]
        for prompt, ids, reward in group:
            factor = 1 / (4 * chance[prompt]) if prompts == "inverse" else 1
            advantage = 1.5 * (reward - sum(rewards) / 3)
            rows.append((policy.encode(prompt), ids, factor * advantage))
    expected, _ = textbook(before, rows)
    assert expected.norm() > 0.1 and apart(gradient(policy.model), expected) < 1e-10


def test_the_expected_gradient_is_the_sum_over_all_draws_by_a_second_way():
    problem = tabular_problem(3, prompts=2, group_size=2, vocabulary=2, length=2)
    uniform = exact_moments(Estimator(), problem)
    chances = prompt_chances_of(Estimator(prompts="weighted"), problem)
    assert chances.tolist() == pytest.approx([1 / 3, 2 / 3])
    for prompts in ("weighted", "inverse"):
        moments = exact_moments(Estimator(prompts=prompts), problem)
        factors = 2 * chances if prompts == "weighted" else torch.ones(2)
        assert torch.allclose(moments.mean, uniform.mean * factors[:, None].to(uniform.mean))
        second = 0.0
        completions = problem.chances.shape[1]
        pairs = [*itertools.product(range(2), itertools.product(range(completions), repeat=2))]
        for groups in itertools.product(pairs, repeat=2):
            probability = 1.0
            step = torch.zeros_like(uniform.mean[0])
            for prompt, (a, b) in groups:
                chance = problem.chances[prompt]
                probability *= float(chances[prompt] * chance[a] * chance[b])
                difference = problem.totals[prompt, a] - problem.totals[prompt, b]
                scores = problem.scores[prompt].sum(1)  # of completions [M, D]
                part = difference * (scores[a] - scores[b]) / 4  # two groups of two rows
                step = step + part / (1 if prompts == "weighted" else 2 * chances[prompt])
            second += probability * float(step.square().sum())
        assert moments.second == pytest.approx(second, rel=1e-9)


def test_a_run_learns_which_prompts_differ(tmp_path):
    def reward(prompts, completions, **_):
        return [
            float(len(c) > 2) if p < "d" else 0.0 for p, c in zip(prompts, completions, strict=True)
        ]

    options = {"prompt_weights": "variance", "max_steps": 6, "eval_every": 1}
    run = letters_trained(tmp_path, letter_task(reward), **options)
    effective = [row["prompts/effective"] for row in run.metrics if "prompts/effective" in row]
    assert effective[-1] < effective[0] - 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "rloo,prompts=weighted"}, "prompts='weighted' is about unequal chances"),
        ({"prompt_weights": "variance", "prompt_floor": 0}, "prompt_floor 0 leaves prompts out"),
        ({"prompt_weights": "variance", "estimator": "dapo"}, "would not be remembered"),
        ({"prompt_weights": "missing"}, "prompt_weights was given as 'missing'"),
    ],
)
def test_weights_that_contradict_the_estimator_are_refused(options, words, tmp_path):
    with refused(words):
        letters_trained(
            tmp_path / "run",
            letter_task(lambda completions, **_: [1.0] * len(completions)),
            **options,
        )


def test_weights_are_divided_out_unless_the_estimator_says_otherwise():
    args = TrainArguments(prompt_weights="variance")
    assert args.estimator.prompts == "inverse" and args.estimator.bias_status == "exact"
    weighted = TrainArguments(prompt_weights="variance", estimator=Estimator(prompts="weighted"))
    assert weighted.estimator.bias_status == "exact_per_prompt"
    assert TrainArguments().estimator.prompts == "uniform"
