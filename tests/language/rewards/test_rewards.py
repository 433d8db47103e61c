"""Rewards as TRL's users write them: arguments, weights, abstentions, metrics, names, declarations."""

from __future__ import annotations

import functools
import inspect
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from refusals import refused, stopped

from tokenrl.language.commands.arguments import EvaluateArguments
from tokenrl.language.rewards.calls import TrainerState
from tokenrl.language.rewards.library import Length, RegexFormat
from tokenrl.language.rewards.loading import load_reward
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.task import PromptTask, find_task
from tokenrl.runs.metric_table import all_metrics

COMPLETIONS = ["one", "three", "", "x" * 500]
PROMPTS = ["p0", "p1", "p2", "p3"]
IDS = [[1], [2, 3], [], [4]]


def call(
    functions, columns=None, *, weights=None, prompts=PROMPTS, completions=COMPLETIONS, **options
):
    rewards = Rewards(functions, weights)
    rewards.state = TrainerState(global_step=3, max_steps=9)
    return rewards(prompts, completions, IDS, columns or {}, **options)


def length(completions, **kwargs):
    return [len(completion) for completion in completions]


def returning(output):
    def answer(completions):
        return output

    return answer


# ---- the signature ----


def test_a_function_gets_by_keyword_what_it_names_and_everything_with_kwargs():
    seen = {}

    def everything(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [1.0] * len(completions)

    def some(*, completion_ids, level, missing=5, trainer_state=None):
        assert missing == 5 and trainer_state.global_step == 3 and trainer_state.max_steps == 9
        return [len(ids) + step for ids, step in zip(completion_ids, level, strict=True)]

    columns = {"level": [10, 20, 30, 40], "prompt": PROMPTS, "completion": ["reference"] * 4}
    result = call([everything, some], columns)
    assert result.values.tolist() == [[1, 11], [1, 22], [1, 30], [1, 41]]
    names = "prompts completions completion_ids trainer_state log_extra log_metric level"
    assert {*seen} == {*names.split()}
    assert (seen["completions"], seen["level"]) == (COMPLETIONS, [10, 20, 30, 40])
    call([everything], columns, prompts=[[{"role": "user", "content": "p"}]] * 4)
    assert seen["completions"][1] == [{"role": "assistant", "content": "three"}]


class Judge:
    def __call__(self, completions, level, factor=3):
        return [factor * len(completion) for completion in completions]


def test_partials_lambdas_objects_and_methods_are_rewards():
    functions = [Judge(), Judge().__call__, functools.partial(Judge(), factor=2)]
    rewards = Rewards([*functions, lambda **_: [4.0] * 4, lambda completions: [5] * 4])
    assert rewards.names == ["Judge", "__call__", "Judge_2", "reward", "reward_2"]
    result = rewards(PROMPTS, COMPLETIONS, IDS, {"level": [0] * 4})
    assert result.values[1].tolist() == [15, 15, 10, 4, 5]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda completions, anwser, **_: [],
            r"reward has a parameter 'anwser'.*Did you mean 'answer'.*completions",
        ),
        (lambda prompt: [0.0], "parameter 'prompt'"),  # TRL withholds the column too
        (lambda completions, /: [0.0], "cannot be passed by keyword"),
        (lambda environments, **_: [], "no column"),
    ],
)
def test_a_column_that_is_missing_is_refused_before_the_first_step(function, words):
    with refused(words):
        Rewards([length, function]).check_columns(["prompt", "answer"])
    Rewards([length, lambda completions, answer: []]).check_columns(["answer"])


# ---- sums, abstentions, metrics ----


@pytest.mark.parametrize(
    "output",
    [
        [1, 0, 1, 0], (True, False, True, False), np.array([True, False] * 2),
        torch.tensor([1.0, 0, 1, 0], requires_grad=True), torch.tensor([1, 0, 1, 0]).bfloat16(),
        [np.float32(1), np.bool_(False), np.int8(1), np.array(0)],
        [torch.tensor(1.0, requires_grad=True), Fraction(0), True, 0.0],
        np.array([1, 0, True, 0.0], dtype=object),
    ],
)  # fmt: skip
def test_every_kind_of_number_is_taken(output):
    result = call(returning(output))
    assert result.total.tolist() == [1, 0, 1, 0] and result.valid.all()


def test_functions_that_all_abstain_everywhere_stop_the_run():
    none = returning([None] * 4)
    assert call([none, length]).valid.all()
    with stopped(r"answer, reward\) abstained from each of 4 .* 'one' of the prompt"):
        call([none, lambda **_: [None] * 4])
    assert not call(none, all_may_abstain=True).valid.any()


def logging(completions, log_extra, log_metric):
    log_extra("length", [len(completion) for completion in completions])
    log_metric("longest", 4)
    log_metric("longest", torch.tensor(6.0))
    return [0.0] * len(completions)


def test_what_functions_log_is_collected():
    result = call([logging, length])
    assert result.extra == {"length": [3, 5, 0, 500]} and result.logged == {"longest": 5}
    with stopped(r"log_extra\('length'\) got 8 values for 4"):
        call([logging, logging])  # none of two functions wins in silence


@pytest.mark.parametrize(
    ("call_name", "name"),
    [
        ("log_metric", "step"), ("log_metric", "eval_reward"), ("log_metric", "kl_stderr"),
        ("log_extra", "prompt"), ("log_extra", "rewards/late"), ("log_extra", "messages"),
        ("log_metric", 3), ("log_metric", ""), ("log_extra", None), ("log_extra", "a\nb"),
    ],
)  # fmt: skip
def test_a_name_that_the_run_uses_itself_or_that_is_no_text_is_refused_at_the_call(call_name, name):
    def late(completions, **logs):
        logs[call_name](name, [777] * len(completions) if call_name == "log_extra" else 777)
        return [0.0] * len(completions)

    message = rf"late gave {call_name} the name {re.escape(repr(name))}: .*'my_score', .*own names.*reward, "
    with stopped(message):
        call([length, late])


@pytest.mark.parametrize("metric", all_metrics(), ids=lambda metric: metric.name)
def test_a_metric_is_reserved_as_it_stands_in_the_table(metric):
    """Those of reward models are free."""

    def logs(completions, log_metric, trainer_state):
        log_metric("my_" + metric.name, 1)
        log_metric(metric.name.format(name="mine", k=4), 1)
        return [0.0] * len(completions)

    if metric.part == "preferences":
        call(logs)
        return
    with stopped(
        f"{re.escape(metric.name.partition('{')[0])}.*own names.*pass@.k., .*prompts/.name., "
    ):
        call(logs)


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, math.nan], []])
def test_weights_that_do_not_fit_are_refused(weights):
    with refused(r"reward_weights .* length, reward: give 2 finite"):
        Rewards([length, lambda **_: []], weights)


# ---- by name ----


def test_rewards_by_name(workplace):
    (workplace / "my_rewards.py").write_text(
        "number = 3\nasync def slow(completions):\n    return [1.0] * len(completions)\n"
        "class Judge:\n    def __call__(self, completions):\n        return [2.0] * len(completions)\n"
        "judge = Judge()\n"
    )
    assert load_reward(length) is length
    assert load_reward(" length ( max = 3, unit='words' )") == Length(max=3, unit="words")
    assert load_reward("regex_format(pattern='a:b/c(d)')") == RegexFormat("a:b/c(d)")
    assert inspect.iscoroutinefunction(load_reward("my_rewards:slow"))
    rewards = Rewards(["my_rewards:slow", f"{workplace}/my_rewards.py:judge", length])
    assert rewards.names == ["slow", "Judge", "length"]
    assert rewards(PROMPTS, COMPLETIONS, IDS, {}).values[0].tolist() == [1, 2, 3]
    (workplace / "length").mkdir()  # a folder of that name is a model
    for spec, message in {
        "my_rewards:slaw": r"has no slaw.*Did you mean 'slow'.*judge",
        "my_rewards:number": "is a int, which cannot be called",
        "lenght": "Give module:function, path/to/file.py:function, the folder",
        3: "is a int, .*; give the function itself",
        "length": r"length holds no saved model: it has no config\.json",
    }.items():
        with refused(message):
            load_reward(spec)
    with refused("No reward function"):
        Rewards([])


# ---- what they declare ----


def right(completions, answer="a"):
    return [float(text == answer) for text in completions]


def silent(completions):
    return [float(text == "a") for text in completions]


def between(completions):
    return [0.5 for _ in completions]


right.binary = True
between.range = (-2, 3)


@pytest.mark.parametrize(
    ("functions", "weights", "binary", "mark", "span"),
    [
        (right, None, True, 1.0, (0, 1)),
        (functools.partial(right, answer="b"), None, True, 1.0, (0, 1)),
        (right, [2.0], False, 2.0, (0, 2)),
        (right, [-1.0], False, None, (-1, 0)),
        (silent, None, False, None, None),
        ([right, between], [10.0, 0.5], False, None, (-1, 11.5)),
        ([right, between], [1.0, -1.0], False, None, (-3, 3)),
        (["exact_match", between], [2.0, 1.0], False, None, (-2, 5)),
    ],
)
def test_what_rewards_declare(functions, weights, binary, mark, span):
    rewards = Rewards(functions, weights)
    assert (rewards.binary, rewards.pass_threshold, rewards.range) == (binary, mark, span)
    assert Rewards(functions, weights, pass_threshold=0.5).pass_threshold == 0.5


@pytest.mark.parametrize(
    ("name", "promise", "value", "message"),
    [
        ("binary", True, 0.5, "be binary and returned 0.5"),
        ("range", (0, 1), 1.01, "lie in the range 0 to 1 and returned 1.01"),
        ("range", (0, 1), -0.01, "lie in the range 0 to 1 and returned -0.01"),
    ],
)
def test_a_reward_that_breaks_its_promise_stops_the_run(name, promise, value, message):
    def lies(completions):
        return [1.0 + 1e-9 * (name == "range"), None, value, 0.0]  # the first is rounding

    setattr(lies, name, promise)
    with stopped(
        rf"lies is declared to {message} for the completion '' of the prompt 'p2': correct"
    ):
        call(lies)
    setattr(lies, name, None)
    assert call(lies).total[2] == value


def test_a_task_s_threshold_is_for_its_own_reward_and_a_setting_is_for_any():
    rows = [{"prompt": "a"}]
    task = PromptTask("t", rows, rows, silent, 2, pass_threshold=0.5)

    def mark(**options):
        return find_task(EvaluateArguments(task=task, **options))[1].pass_threshold

    assert mark() == 0.5 and mark(pass_threshold=0.75) == 0.75
    assert mark(reward_weights=(3.0,)) is None and mark(reward=("length(max=3)",)) is None
    assert mark(reward=("length(max=3)",), pass_threshold=-0.5) == -0.5


def spoil(value):
    """Change a value in place as far as it can be."""
    for item in (
        [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        spoil(item)
    if isinstance(value, list | dict | set):
        value.clear()
    if isinstance(value, np.ndarray):
        value[:] = 0


COLUMNS = {
    "texts": ["a", None, True, 3.5],
    "lists": [[1, 2], [[1], "b"], [], [{"k": [0]}]],
    "dicts": [{"k": {"deep": [1]}}] * 4,  # one object in several rows, as in a group
    "sets": [{1}, (1, [2]), np.arange(3), {"k": {2}}],
    "environments": [[1]] * 4,  # a column as any other, without an environment
}


SPOILING = """
{define} {name}(trainer_state, log_extra, log_metric, **columns):
    log_extra("seen_by_{name}", [repr(columns | vars(trainer_state))] * 4)
    spoil(columns | vars(trainer_state))
    vars(trainer_state).clear()
    return [1.0] * 4
"""


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_what_a_function_changes_in_place_reaches_nobody_else(tmp_path, timeout):
    file = tmp_path / "spoiling.py"
    definitions = {"first": "def", "second": "async def", "third": "def"}
    functions = [SPOILING.format(name=name, define=define) for name, define in definitions.items()]
    file.write_text("\n".join(["import numpy as np", inspect.getsource(spoil), *functions]))
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    data = (prompts, completions, IDS, COLUMNS)
    before = repr(data)
    specs = [f"{file}:{name}" for name in definitions]
    rewards = Rewards(specs, timeout=timeout, sources=specs)
    views = {view for _ in range(2) for column in rewards(*data).extra.values() for view in column}
    assert repr(data) == before
    (view,) = views
    assert "'deep': [1]" in view and "'content': 'three'" in view


first, judge = returning([1.0, 2.0, 4.0, 8.0]), returning([None, 1.0, None, 3.0])
half, tens = returning([None, None, 1.0, 1.0]), returning([10, 20, None, None])


@pytest.mark.parametrize(
    ("functions", "weights", "leaves_out", "valid", "total"),
    [
        ([first, judge], None, False, [1, 1, 1, 1], [1, 3, 4, 11]),
        ([judge, tens], [2, -1], False, [1, 1, 0, 1], [-10, -18, 0, 6]),
        ([first, judge], None, True, [0, 1, 0, 1], [0, 3, 0, 11]),
        ([first, judge], [1, 0], True, [1, 1, 1, 1], [1, 2, 4, 8]),  # it has no weight
        ([judge, half], [2, 0], False, [0, 1, 0, 1], [0, 2, 0, 6]),
        ([judge, half], None, True, [0, 0, 0, 1], [0, 0, 0, 4]),
        ([judge, half], [0, 0], False, [0, 1, 1, 1], [0, 0, 0, 0]),
    ],
)
def test_a_row_counts_if_a_weighted_function_rewards_it_or_all_of_them_do(
    functions, weights, leaves_out, valid, total
):
    rewards = Rewards(functions, weights, leaves_out=leaves_out)
    result = rewards(["p"] * 4, ["c"] * 4, [[1]] * 4, {})
    assert result.valid.tolist() == [bool(x) for x in valid] and result.total.tolist() == total


def stumbles(completions, log_extra, **_):
    if "bad" in completions:
        raise StopIteration("off")
    log_extra("size", [len(text) for text in completions])
    return [float(len(text)) for text in completions]


async def stumbles_later(completions, log_extra, **_):
    return stumbles(completions, log_extra)


@pytest.mark.parametrize(
    ("function", "timeout"), [(stumbles, None), (stumbles_later, None), (stumbles, 60.0)]
)
def test_a_row_for_which_a_function_fails_gets_no_reward_of_this_function_alone(function, timeout):
    texts = ["a", "bad", "ccc"]
    rewards = Rewards([function, Length(max=9)], timeout=timeout, abstains_on_error=True)
    result = rewards(["p"] * 3, texts, [[1]] * 3, {})
    assert result.values.T.tolist() == [[1, pytest.approx(math.nan, nan_ok=True), 3], [0, 0, 0]]
    row = "for the completion 'bad' of the prompt 'p'."
    assert result.valid.all() and rewards.faults[function.__name__].endswith(row)
    with stopped("StopIteration"):
        Rewards(function, timeout=timeout)(["p"] * 3, texts, [[1]] * 3, {})
