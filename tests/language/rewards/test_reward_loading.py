"""Rewards by name, and what they declare: what is right (binary, or with a threshold), and their range."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

import toy_tasks
from tokenrl.errors import Refused, Stopped
from tokenrl.language.inspect.arguments import EvaluateArguments
from tokenrl.language.rewards.library import ExactMatch, Length, RegexFormat, ValidJson
from tokenrl.language.rewards.loading import load_reward
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.task import find_task


def right(completions, wanted="a"):
    return [float(text == wanted) for text in completions]


right.binary = True


def silent(completions):
    return [float(text == "a") for text in completions]


@pytest.mark.parametrize(
    ("functions", "weights", "binary", "mark"),
    [
        (right, None, True, 1.0),
        (partial(right, wanted="b"), None, True, 1.0),
        (right, [2.0], False, 2.0),
        (right, [-1.0], False, None),
        (silent, None, False, None),
        ([right, silent], None, False, None),
        ([right, right], None, False, None),
        ("exact_match", None, True, 1.0),
        ("numeric_answer", None, True, 1.0),
        ("valid_json", None, True, 1.0),
        ("regex_format(pattern='a')", None, True, 1.0),
        ("length(target=3)", None, False, None),
        ("repetition", None, False, None),
        ("sentiment", None, False, None),
    ],
)
def test_what_a_reward_declares(functions, weights, binary, mark):
    rewards = Rewards(functions, weights)
    assert (rewards.binary, rewards.pass_threshold) == (binary, mark)


def test_a_threshold_that_is_named_stands_above_a_declaration():
    assert Rewards(right, pass_threshold=0.5).pass_threshold == 0.5
    assert Rewards([right, silent], pass_threshold=2.0).pass_threshold == 2.0


def test_a_reward_that_breaks_its_promise_stops_the_run():
    def lies(completions):
        return [0.0, None, 0.5]

    lies.binary = True
    with pytest.raises(
        Stopped, match=r"lies is declared to be binary and returned 0.5 for row 2, completion 'c'"
    ):
        Rewards(lies)([""] * 3, list("abc"), [[1]] * 3, {}, step=0)
    lies.binary = False
    assert Rewards(lies)([""] * 3, list("abc"), [[1]] * 3, {}, step=0).total.tolist() == [0, 0, 0.5]


def between(completions):
    return [0.5 for _ in completions]


between.range = (-2, 3)


@pytest.mark.parametrize(
    ("functions", "weights", "expected"),
    [
        (right, None, (0, 1)),
        (partial(between), None, (-2, 3)),
        (silent, None, None),
        (between, [-2.0], (-6, 4)),
        ([right, between], [10.0, 0.5], (-1, 11.5)),
        ([right, between], [1.0, -1.0], (-3, 3)),
        ([right, silent], None, None),
        (["exact_match", "repetition", "sentiment"], [2.0, 1.0, 0.5], (-1.5, 2.5)),
        ("length(target=3)", None, None),
    ],
)
def test_the_range_that_rewards_declare(functions, weights, expected):
    assert Rewards(functions, weights).range == expected


@pytest.mark.parametrize("found", [(1, 0), (0, 0), (0,), 5, "ab", (0, float("inf"))])
def test_a_range_that_is_none_is_refused(found):
    def odd(completions):
        return [0.0 for _ in completions]

    odd.range = found
    with pytest.raises(Refused, match=r"odd has an attribute range = .* such as \(0, 1\)"):
        Rewards(odd)


@pytest.mark.parametrize("outside", [1.01, -0.01])
def test_a_reward_that_leaves_its_range_stops_the_run(outside):
    def drifts(completions):
        return [1.0 + 1e-9, None, outside]  # the first is rounding

    drifts.range = (0, 1)
    with pytest.raises(Stopped, match=rf"drifts is declared .* 0 to 1 and returned {outside} for row 2"):
        Rewards(drifts)([""] * 3, list("abc"), [[1]] * 3, {}, step=0)


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        *(("sort_digits", 1.0), ("addition", 1.0), ("sentiment", 1.0), ("countdown", 1.0)),
        *(("vowels", None), ("reverse_text", None), ("target_length", None)),
    ],
)
def test_toy_tasks_say_what_is_right(name, mark):
    task, rewards = find_task(EvaluateArguments(task=name))
    assert rewards.pass_threshold == mark and rewards.binary == (mark == 1.0 and name != "countdown")
    if mark is None:
        return
    rows = [({"prompts": [row["prompt"]], "completions": [row["completion"]]}) for row in task.demonstrations]
    paid = {task.reward(**row)[0] for row in rows[:200]}
    assert max(paid) == mark > min(paid)


def test_a_task_s_threshold_is_for_its_own_reward_and_a_setting_is_for_any():
    rows = [{"prompt": "a"}]
    task = SimpleNamespace(
        name="t",
        train_prompts=rows,
        eval_prompts=rows,
        reward=silent,
        max_completion_length=2,
        pass_threshold=0.5,
    )

    def mark(**options):
        return find_task(EvaluateArguments(task=task, **options))[1].pass_threshold

    assert mark() == 0.5 and mark(pass_threshold=0.75) == 0.75
    assert mark(reward_weights=(3.0,)) is None and mark(reward=("repetition",)) is None
    assert mark(reward=("repetition",), pass_threshold=-0.5) == -0.5
    countdown = EvaluateArguments(task="countdown", reward=("toy_tasks.countdown:reward",))
    assert (
        find_task(countdown)[1].pass_threshold is None and toy_tasks.load("countdown").pass_threshold == 1.0
    )


def test_rewards_of_the_library_by_name(tmp_path, monkeypatch):
    assert load_reward("exact_match") == ExactMatch()
    assert load_reward("length(target=20)") == Length(target=20)
    assert load_reward(" length ( max = 3, unit='words' )") == Length(max=3, unit="words")
    assert load_reward("regex_format(pattern='a:b/c(d)')") == RegexFormat("a:b/c(d)")
    assert load_reward("valid_json(required=['a', 'b'])") == ValidJson(("a", "b"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "length").mkdir()  # a folder of that name is a model
    with pytest.raises(Refused, match=r"length holds no saved model: it has no config\.json"):
        load_reward("length")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lenght(target=20)", "no reward 'lenght'.*Did you mean 'length'.*module:function"),
        ("exact", "no reward 'exact'.*Did you mean 'exact_match'"),
        ("length", r"length\(target=None, max=None\): give exactly one of the two"),
        ("length(20)", "cannot be read"),
        ("length(targt=20)", "There is no setting 'targt'. Did you mean 'target'"),
        ("length(target=20", "cannot be read. Write options as name=value"),
        ("length(target=1+1)", "cannot be read"),
        ("length(target=__import__('os').getpid())", "cannot be read"),
        ("length(**{'target': 3})", "cannot be read"),
        ("length(target=1)(2)", "cannot be read"),
        ("regex_format", "missing 1 required positional argument: 'pattern'"),
    ],
)
def test_specs_that_cannot_be_read_are_refused(spec, words):
    with pytest.raises(Refused, match=words) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)
