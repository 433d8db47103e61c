"""What a reward function may return, what stops the run, and async functions that run together."""

import asyncio
import functools
import math
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch

from tokenrl.errors import Stopped
from tokenrl.language.rewards.rewards import Rewards

COMPLETIONS = ["one", "three", "", "x" * 500]
PROMPTS = ["p0", "p1", "p2", "p3"]
IDS = [[1], [2, 3], [], [4]]


def call(functions, columns=None):
    return Rewards(functions)(PROMPTS, COMPLETIONS, IDS, columns or {}, step=3)


def length(completions, **kwargs):
    return [len(completion) for completion in completions]


def returning(output):
    def answer(completions):
        return output

    return answer


def test_an_exception_names_function_row_and_completion_and_keeps_its_cause():
    def strict(completions, log_metric, answer):
        log_metric("calls", 1)
        return [1 / len(completion) for completion in completions]

    with pytest.raises(
        Stopped, match=r"strict raised ZeroDivisionError: .* \(row 2 of 4, completion ''\)"
    ) as e:
        call([length, strict], {"answer": list("abcd")})
    assert isinstance(e.value.__cause__, ZeroDivisionError)

    def batch_only(completions):
        if len(completions) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(
        Stopped, match=r"batch_only raised MemoryError: too many \(rows 0 to 3 together.*'one'\)"
    ):
        call(batch_only)

    async def later(completions):
        await asyncio.sleep(0)
        return [{"one": 1.0}[completion] for completion in completions]

    with pytest.raises(Stopped, match=r"later raised KeyError: 'three' \(row 1 of 4, completion 'three'\)"):
        call([length, later])


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (np.float32("nan"), "nan"),
        (10**400, r"10+ \(int\)"), (torch.tensor(math.nan), "nan"),
        ("1.0", r"'1.0' \(str\)"), ([1.0], r"\[1.0\] \(list\)"),
        (torch.tensor([1.0]), r"tensor\(\[1.\]\) \(Tensor\)"), (1j, r"1j \(complex\)"), ({}, "dict"),
    ],
)  # fmt: skip
def test_one_bad_value_stops_the_run_and_names_its_row(bad, shown):
    with pytest.raises(
        Stopped, match=rf"answer returned .*{shown}.* for row 3, completion 'xxx.*\.\.\.x+'"
    ) as e:
        call([length, returning([0.0, None, 1.0, bad])])
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("bad", [np.array([0, 1, math.nan, 2]), torch.tensor([0, 1, math.inf, 2])])
def test_a_bad_value_in_an_array_is_no_abstention(bad):
    with pytest.raises(Stopped, match="row 2, completion ''"):
        call(returning(bad))


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (1.0, r"float \(1.0\)"), (True, "bool"), (np.float64(2), "float64"), (torch.tensor(2.0), "Tensor"),
        ("abcd", r"str \('abcd'\)"), (None, r"NoneType.* Is a return missing\?"), ({}, "dict"),
        ({1, 2}, "set"),
        ((x for x in [1, 2, 3, 4]), "generator"), (np.ones((4, 1)), r"of shape \(4, 1\)"),
        (torch.ones(1, 4), r"of shape \(1, 4\)"),
    ],
)  # fmt: skip
def test_an_output_that_is_no_list_is_never_broadcast(output, shown):
    with pytest.raises(Stopped, match=rf"answer returned a .*{shown}") as e:
        call(returning(output))
    assert "4 completions (row 0: 'one')" in str(e.value)


@pytest.mark.parametrize(
    ("output", "row"),
    [([], "row 0, completion 'one'"), ([1.0], "row 1, completion 'three'"), (np.ones(5), "too many")],
)
def test_a_wrong_count_stops_the_run_with_both_counts(output, row):
    with pytest.raises(Stopped, match=rf"answer returned {len(output)} rewards for 4 completions \({row}"):
        call(returning(output))


@pytest.mark.parametrize(
    "output",
    [
        [1, 0, 1, 0], (True, False, True, False), np.array([1, 0, 1, 0]), np.array([True, False] * 2),
        torch.tensor([1.0, 0, 1, 0], requires_grad=True), torch.tensor([1, 0, 1, 0]).bfloat16(),
        [np.float32(1), np.bool_(False), np.int8(1), np.array(0)], [torch.tensor(1), torch.tensor(0.0), 1, 0],
        [torch.tensor(1.0, requires_grad=True), Fraction(0), True, 0.0],
        np.array([1, 0, True, 0.0], dtype=object),
    ],
)  # fmt: skip
def test_every_kind_of_number_is_taken(output):
    result = call(returning(output))
    assert result.total.tolist() == [1, 0, 1, 0] and result.valid.all()


@pytest.mark.gpu
def test_tensors_on_an_accelerator_are_taken():
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    device = torch.accelerator.current_accelerator()
    assert call(returning(torch.arange(4.0, device=device))).total.tolist() == [0, 1, 2, 3]
    assert call(returning(list(torch.arange(4.0, device=device)))).total.tolist() == [0, 1, 2, 3]


# ---- async ----


def meeting():
    """Two functions that each wait for the other: run one after the other, neither would ever return."""
    here, there = [], []

    def member(mine, other, value):
        async def attend(completions):
            mine.append(asyncio.Event())
            mine[-1].set()
            while not other:
                await asyncio.sleep(0)
            await asyncio.wait_for(other[-1].wait(), timeout=10)
            return [value] * len(completions)

        return attend

    return [member(here, there, 1.0), member(there, here, 2.0)]


def test_async_functions_run_together_and_keep_their_columns():
    first, second = meeting()
    result = call([first, length, second])
    assert result.values[1].tolist() == [1, 5, 2]


def test_async_works_in_a_thread_and_inside_a_running_loop():
    async def notebook():
        return call(meeting()).total.tolist()

    assert asyncio.run(notebook()) == [3.0] * 4
    found = []
    thread = threading.Thread(target=lambda: found.append(call(meeting()).total.tolist()))
    thread.start()
    thread.join()
    assert found == [[3.0] * 4]


def test_what_an_async_function_keeps_between_calls_stays_usable():
    kept = []

    class Judge:
        async def __call__(self, completions):
            kept.append(asyncio.get_running_loop())
            return [0.0] * len(completions)

    call(Judge())
    call([Judge(), functools.partial(Judge())])
    assert len(kept) == 3 and len(set(kept)) == 1 and not kept[0].is_closed()


@pytest.mark.filterwarnings("error")
def test_no_coroutine_is_left_over_when_a_sync_function_raises():
    ran = []

    async def later(completions):
        ran.append(len(completions))
        return [0.0] * len(completions)

    with pytest.raises(Stopped, match="reward raised ZeroDivisionError"):
        call([later, lambda completions: 1 / 0])
    assert ran == [4]
