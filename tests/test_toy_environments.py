"""The toy tasks of several turns: their rules, and demonstrations that begin as their episodes do."""

from __future__ import annotations

from collections import Counter

import pytest

import toy_tasks
from toy_tasks import calculator, guess_number


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
    odd = "|1+|+1|1++2|1-2|2*3|12345|__import__('os')|\u0661+1"
    for text in [*odd.split("|"), "1+1" * 100_000]:
        with pytest.raises(ValueError, match="no sum"):
            environment.calculate(text)
    assert environment.get_reward() == pytest.approx(-1.1)
    environment.reset(prompt="1+2")
    assert environment.get_reward() == 0


def test_answers_and_demonstrations_of_the_calculator():
    task = toy_tasks.load("calculator")
    chat = [{"role": "user", "content": "999+298+808"}]
    answers = {"2105": 1, "": 0, "1985": 0, "2105 ": 0, "02105": 0, "٢١٠٥": 0}
    completions = [[{"role": "assistant", "content": text}] for text in answers]
    assert task.reward([chat] * len(answers), completions) == list(answers.values())
    of_the_tool = [{"role": "tool", "name": "calculate", "content": "2105"}]
    assert task.reward([chat], [of_the_tool]) == [0]
    assert calculator.without_carry("999+298+808") == "1985"
    counts = Counter()
    for row in task.demonstrations:
        is_right = row["completion"] == calculator.right(row["prompt"][0]["content"])
        counts[len(row["prompt"]) > 1, row["completion"].isdigit(), is_right] += 1
    # wrong answers, calls, and right answers behind the calls
    assert counts == {
        (False, True, False): 3277,
        (False, False, False): 819,
        (True, True, True): 819,
    }
    sums = [
        {calculator.canonical(row["prompt"][0]["content"]) for row in rows}
        for rows in (task.train_prompts, task.eval_prompts)
    ]
    assert sums[0].isdisjoint(sums[1])
