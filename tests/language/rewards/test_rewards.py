"""Reward functions as TRL's users write them: arguments, weights, abstentions, metrics, names."""

import functools
import inspect
import math
import re
import sys

import numpy as np
import pytest
import torch

from tokenrl.errors import Refused, Stopped
from tokenrl.language.rewards.loading import load_reward
from tokenrl.language.rewards.rewards import Rewards

COMPLETIONS = ["one", "three", "", "x" * 500]
PROMPTS = ["p0", "p1", "p2", "p3"]
IDS = [[1], [2, 3], [], [4]]


def call(functions, columns=None, *, weights=None, prompts=PROMPTS, completions=COMPLETIONS, **options):
    return Rewards(functions, weights)(prompts, completions, IDS, columns or {}, **{"step": 3} | options)


def length(completions, **kwargs):
    return [len(completion) for completion in completions]


def returning(output):
    def answer(completions):
        return output

    return answer


# ---- the signature ----


def test_a_function_gets_by_keyword_what_it_names_and_everything_with_kwargs():
    seen = {}

    def only_completions(completions):
        return [0.0] * len(completions)

    def everything(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [1.0] * len(completions)

    def some(*, completion_ids, level, missing=5, trainer_state=None):
        assert missing == 5 and trainer_state.global_step == 3 and trainer_state.max_steps == 9
        return [len(ids) + step for ids, step in zip(completion_ids, level, strict=True)]

    columns = {"level": [10, 20, 30, 40], "prompt": PROMPTS, "completion": ["reference"] * 4}
    result = call([only_completions, everything, some], columns, max_steps=9)
    assert result.values.tolist() == [[0, 1, 11], [0, 1, 22], [0, 1, 30], [0, 1, 41]]
    assert set(seen) == {
        "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "level"
    }  # fmt: skip
    assert (seen["prompts"], seen["completions"], seen["level"]) == (PROMPTS, COMPLETIONS, [10, 20, 30, 40])


def test_partials_lambdas_objects_and_methods_are_rewards():
    class Judge:
        def __call__(self, completions, **kwargs):
            return [2.0] * len(completions)

        def method(self, completions):
            return [3.0] * len(completions)

    def scaled(completions, level, factor=3):
        return [factor * len(completion) for completion in completions]

    functions = [Judge(), Judge().method, functools.partial(scaled, factor=2), lambda completions: [4.0] * 4]
    rewards = Rewards([*functions, lambda **_: [5] * 4, scaled])
    assert rewards.names == ["Judge", "method", "scaled", "reward", "reward_2", "scaled_2"]
    result = rewards(PROMPTS, COMPLETIONS, IDS, {"level": [0] * 4}, step=0)
    assert result.values[1].tolist() == [2, 3, 10, 4, 5, 15]


def test_a_trl_style_format_reward_on_chat_messages():
    def format_reward(completions, **kwargs):
        contents = [completion[0]["content"] for completion in completions]
        return [1.0 if re.match(r"^<think>.*</think>$", content) else 0.0 for content in contents]

    chat = [{"role": "user", "content": "hello"}]
    texts = ["<think>yes</think>", "no", "<think>", "<think></think>"]
    assert call(format_reward, prompts=[chat] * 4, completions=texts).total.tolist() == [1, 0, 0, 1]
    ready = [[{"role": "assistant", "content": text}] for text in texts]
    assert call(format_reward, prompts=[chat] * 4, completions=ready).total.tolist() == [1, 0, 0, 1]


def test_a_column_that_is_missing_is_refused_before_the_first_step():
    def exact(completions, anwser, **kwargs):
        raise AssertionError("must not be called")

    rewards = Rewards([length, exact])
    with pytest.raises(Refused, match=r"exact has a parameter 'anwser'.*Did you mean 'answer'.*completions"):
        rewards.check_columns(["prompt", "answer"])
    with pytest.raises(Refused, match="exact has a parameter 'anwser'"):
        rewards(PROMPTS, COMPLETIONS, IDS, {}, step=0)
    with pytest.raises(Refused, match=r"parameter 'prompt'"):  # TRL withholds the column too
        Rewards(lambda prompt: [0.0]).check_columns(["prompt"])
    with pytest.raises(Refused, match="cannot be passed by keyword"):
        Rewards(lambda completions, /: [0.0]).check_columns([])
    Rewards([length, exact]).check_columns(["anwser"])


# ---- sums, abstentions, metrics ----


def test_weights_abstentions_and_metrics():
    def first(completions):
        return [1, None, 3, None]

    def second(completions):
        return [10, 20, None, None]

    result = call([first, second], weights=[2, -1])
    np.testing.assert_array_equal(result.values, [[1, 10], [math.nan, 20], [3, math.nan], [math.nan] * 2])
    assert result.values.dtype == result.total.dtype == np.float64
    assert result.total.tolist() == [2 - 10, -20, 6, 0]
    assert result.valid.tolist() == [True, True, True, False]
    assert result.metrics == {
        "rewards/first/mean": 2,
        "rewards/first/std": pytest.approx(math.sqrt(2)),
        "rewards/second/mean": 15,
        "rewards/second/std": pytest.approx(math.sqrt(50)),
    }


def test_a_function_that_abstains_everywhere_has_no_metric_and_all_of_them_stop_the_run():
    result = call([returning([None] * 4), length])
    assert list(result.metrics) == ["rewards/length/mean", "rewards/length/std"]
    assert call(returning([None, None, 5, None])).metrics == {
        "rewards/answer/mean": 5,
        "rewards/answer/std": 0,
    }
    with pytest.raises(Stopped, match=r"answer, reward\) abstained from each of the 4 .* row 0, 'one'"):
        call([returning([None] * 4), lambda **_: [None] * 4])
    assert not call(returning([None] * 4), all_may_abstain=True).valid.any()


def test_what_functions_log_is_collected():
    def logging(completions, log_extra, log_metric):
        log_extra("length", [len(completion) for completion in completions])
        log_metric("longest", 4)
        log_metric("longest", torch.tensor(6.0))
        return [0.0] * len(completions)

    result = call([logging, length])
    assert result.extra == {"length": [3, 5, 0, 500]} and result.metrics["longest"] == 5
    with pytest.raises(Stopped, match=r"log_extra\('half'\) got 2 values for 4"):
        call(lambda log_extra, **_: log_extra("half", [1, 2]) or [0.0] * 4)


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, math.nan], [math.inf, 1], []])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(Refused, match=r"reward_weights .* length, reward: give 2 finite"):
        Rewards([length, lambda **_: []], weights)


def test_no_function_is_refused():
    with pytest.raises(Refused, match="No reward function"):
        Rewards([])


# ---- loading by name ----


def test_rewards_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_rewards.py").write_text(
        "number = 3\nasync def slow(completions):\n    return [1.0] * len(completions)\n"
        "class Judge:\n    def __call__(self, completions):\n        return [2.0] * len(completions)\n"
        "judge = Judge()\n"
    )
    (tmp_path / "broken_rewards.py").write_text("raise OSError('no key')")
    assert load_reward(length) is length
    assert inspect.iscoroutinefunction(load_reward("my_rewards:slow"))
    rewards = Rewards(["my_rewards:slow", f"{tmp_path}/my_rewards.py:judge", length])
    assert rewards.names == ["slow", "Judge", "length"]
    assert rewards(PROMPTS, COMPLETIONS, IDS, {}, step=0).values[0].tolist() == [1, 2, 3]
    for spec, message in {
        "my_rewards:slaw": r"has no slaw.*Did you mean 'slow'.*judge",
        "my_rewards:number": "is a int, which cannot be called",
        "broken_rewards:f": "OSError: no key",
        "no_rewards:f": "no module no_rewards",
        "lenght": "Give module:function, path/to/file.py:function, the folder",
        3: "is a int; give a callable",
    }.items():
        with pytest.raises(Refused, match=message):
            load_reward(spec)
