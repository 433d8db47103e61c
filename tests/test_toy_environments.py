"""The toy tasks of several turns: their rules, and demonstrations that begin as their episodes do."""

from __future__ import annotations

import pytest

import toy_tasks
from toy_tasks import calculator, guess_number

TASKS = {name: toy_tasks.load(name) for name in ("guess_number", "calculator")}


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return TASKS[request.param]


@pytest.mark.parametrize(
    "text", ["", "7", "032", "64", "00", "32 ", "٣٢", "-1", "3" * 10_000, "<unk>"]
)
def test_a_text_that_is_no_guess_costs_its_turn(text):
    game = guess_number.GuessNumber(turns=2)
    assert game.reset(seed=3) == game.reset(seed=3) == ("01-03:", {})
    assert game.step(text) == (" 01-03:", 0.0, False, False, {})
    assert game.step(text) == (" 01-03:", 0.0, True, False, {})


def test_the_calculator_adds_costs_and_runs_no_code():
    environment = calculator.Calculator()
    environment.reset(prompt="123+456")
    assert environment.get_reward() == 0
    assert environment.calculate("123+456+9999") == "10578"
    for text in (
        "",
        "1+",
        "+1",
        "1++2",
        "1-2",
        "2*3",
        "12345",
        "__import__('os')",
        "1+1" * 100_000,
        "\u0661+1",
    ):
        with pytest.raises(ValueError, match="no sum"):
            environment.calculate(text)
    assert environment.get_reward() == pytest.approx(-1.1)
    environment.reset(prompt="1+2")
    assert environment.get_reward() == 0


def test_answers_and_demonstrations_of_the_calculator():
    task = TASKS["calculator"]
    chat = [{"role": "user", "content": "999+298+808"}]
    answers = {"2105": 1, "": 0, "1985": 0, "2105 ": 0, "02105": 0, "٢١٠٥": 0}
    completions = [[{"role": "assistant", "content": text}] for text in answers]
    assert task.reward([chat] * len(answers), completions) == list(answers.values())
    of_the_tool = [{"role": "tool", "name": "calculate", "content": "2105"}]
    assert task.reward([chat], [of_the_tool]) == [0]
    assert calculator.without_carry("999+298+808") == "1985"
    direct, called = 0, 0
    for row in task.demonstrations:
        sums = calculator.right(row["prompt"][0]["content"])
        if len(row["prompt"]) == 1 and row["completion"].isdigit():
            direct += 1
            assert row["completion"] != sums
        elif len(row["prompt"]) == 1:
            called += 1
        else:
            assert row["completion"] == sums
    assert (direct, called) == (3277, 819)
    held_out = {calculator.canonical(row["prompt"][0]["content"]) for row in task.eval_prompts}
    assert held_out.isdisjoint(
        calculator.canonical(row["prompt"][0]["content"]) for row in task.train_prompts
    )
