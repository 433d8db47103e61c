"""The toy tasks of several turns: their rules, and demonstrations that begin as their episodes do."""

from __future__ import annotations

import itertools
import re
import runpy
from pathlib import Path

import pytest

import toy_tasks
from tokenrl.language.policy.model import wrap
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.tools import assistant_message
from tokenrl.language.supervised.fit import encode_demonstrations
from toy_tasks import calculator, guess_number
from toy_tasks.models import EOS

TASKS = {name: toy_tasks.load(name) for name in ("guess_number", "calculator")}


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return TASKS[request.param]


def replayed(task, policy, row):
    """Return the ids that a player has at the last turn of a demonstration, after the same turns."""
    prompt = row["prompt"]
    if chat := not isinstance(prompt, str):
        turns = [
            calculator.right(prompt[0]["content"]) if m["role"] == "tool" else None
            for m in prompt[1:]
        ]
        turns = [prompt[0]["content"].join(calculator.CALL)] * (len(turns) // 2)
        prompt = prompt[:1]
    else:
        turns = [part[-2:] for part in prompt.split(EOS)[:-1]]
        prompt = ""
    seed = next(s for s in itertools.count() if played(s, turns, row) or chat)
    environments = Environments(task.environment)
    [episode] = environments.reset([{"prompt": prompt}], [seed])
    ids = policy.encode(episode.opening, tools=episode.tools)
    for turn in turns:
        sampled = [*policy.tokenizer(turn).input_ids, policy.tokenizer.eos_token_id]
        message = assistant_message(policy.tokenizer, sampled, ids, turn, episode.tools)
        [answer] = environments.step([episode], [message])
        assert not answer.ending and not answer.failure and answer.reward == 0
        ids = (
            ids
            + sampled
            + policy.reply_ids(answer.messages, ended=True, chat=chat, tools=episode.tools)
        )
    return ids


def played(seed, turns, row):
    """Return whether the game of this seed, played so, has the observations of a demonstration's prompt."""
    if not isinstance(row["prompt"], str):
        return False
    game = guess_number.GuessNumber()
    text, _ = game.reset(seed=seed)
    for turn in turns:
        observation, _, over, _, _ = game.step(turn)
        text += turn + EOS + observation
        if over:
            return False
    return text == row["prompt"]


def test_a_demonstration_begins_with_the_tokens_of_the_same_episode(task):
    policy = wrap(*task.build(0))
    rows = task.demonstrations[:40]
    for row, (prompt, completion) in zip(rows, encode_demonstrations(policy, rows), strict=True):
        assert prompt == replayed(task, policy, row)
        assert policy.tokenizer.unk_token_id not in prompt + completion
        assert (
            completion[-1] == policy.tokenizer.eos_token_id
            and completion.count(completion[-1]) == 1
        )
        assert len(prompt) + len(completion) <= policy.context


def test_demonstrations_of_games_are_legal_and_each_first_guess_occurs():
    rows = TASKS["guess_number"].demonstrations
    for row in rows:
        low, high = map(int, row["prompt"].rpartition(EOS)[2].removesuffix(":").split("-"))
        assert low <= int(row["completion"]) <= high
    first = [row["completion"] for row in rows if row["prompt"] == "01-15:"]
    assert len(first) == 2048 and len(set(first)) == 15


def wins(middle):
    """Return how many of 63 numbers are guessed within six turns; a guess is middle(low, high)."""
    result = {}
    for seed in range(2000):
        game = guess_number.GuessNumber(turns=6)
        observation, _ = game.reset(seed=seed)
        over, reward = False, 0.0
        while not over:
            low, high = map(int, observation.removesuffix(":").split("-"))
            observation, reward, over, truncated, _ = game.step(f"{middle(low, high):02d}")
            assert not truncated and reward in (0, 1)
        result.setdefault(game._number, reward)
    assert set(result) == set(range(1, 64))
    return sum(result.values())


def test_halving_alone_finds_every_number():
    assert wins(lambda low, high: (low + high) // 2) == 63
    assert wins(lambda low, high: 33 if (low, high) == (1, 63) else (low + high) // 2) == 62
    assert wins(lambda low, high: low) == 6


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


@pytest.mark.slow
def test_the_recipe_trains_each_seed_once_prints_and_draws(short_warm_start, tmp_path, capsys):
    recipe = runpy.run_path(str(Path(__file__).parent.parent / "recipes" / "language" / "turns.py"))
    args = recipe["Arguments"](seeds=2, max_steps=2, output_dir=tmp_path / "runs")
    recipe["main"](args)
    first = capsys.readouterr().out
    lines = re.findall(
        r"(?m)^(\w+) (\d): greedy [-.\d]+ -> [-.\d]+, turns [.\d]+ -> [.\d]+(.*)$", first
    )
    assert [line[:2] for line in lines] == [(name, seed) for name in TASKS for seed in "01"]
    assert all(
        re.search(r"first guess \S+ with probability 0\.\d\d", line[2]) for line in lines[:2]
    )
    assert (tmp_path / "runs" / "turns.png").stat().st_size > 10_000
    metrics = tmp_path / "runs" / "calculator_1" / "metrics.jsonl"
    written = metrics.stat().st_mtime_ns
    recipe["main"](args)
    assert capsys.readouterr().out == first and metrics.stat().st_mtime_ns == written
