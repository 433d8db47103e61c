"""What holds for every toy task of one turn: disjoint prompts, rewards in range, wrong demonstrations."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

import toy_tasks
from tokenrl.language.rewards.loading import declared_range

LOADED = {name: toy_tasks.load(name) for name in toy_tasks.NAMES}
TASKS = {name: task for name, task in LOADED.items() if task.environment is None}
NAMES = tuple(TASKS)
MODULES = {name: importlib.import_module(f"toy_tasks.{name}") for name in NAMES}
TAUGHT = [name for name, task in TASKS.items() if task.demonstrations]
BEST = dict.fromkeys(NAMES, 1.0) | {"target_length": 0.0}
WORST = dict.fromkeys(NAMES, 0.0) | {"target_length": -1.0}

every_task = pytest.mark.parametrize("name", NAMES)
every_taught_task = pytest.mark.parametrize("name", TAUGHT)


ROWS = {
    name: {row["prompt"]: row for row in (*task.train_prompts, *task.eval_prompts)}
    for name, task in TASKS.items()
}


def score(name, pairs):
    """Rewards of (prompt, completion) pairs, with the prompts' own columns and some that trainers add."""
    rows = [ROWS[name][prompt] for prompt, _ in pairs]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    details = {"completion_ids": [[3]] * len(pairs), "trainer_state": None}
    prompts = columns.pop("prompt")
    return TASKS[name].reward(prompts, [text for _, text in pairs], **columns, **details)


def right_answer(name, prompt):
    if name in ("vowels", "sentiment"):
        return "aeiou" if name == "vowels" else " great."
    module = MODULES[name]
    return (
        module.right(prompt)
        if name != "target_length"
        else module.write(prompt, module.asked_length(prompt))
    )


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("sort_numbers", {}, r"sort_numbers.*sort_digits, reverse_text, .*target_length"),
        (
            "sort_digits",
            {"colour": "red"},
            "no argument colour; choose from: seed, digits, wrong_share",
        ),
        ("sort_digits", {"digits": 3}, "digits=3"),
        ("sort_digits", {"eval_size": 0}, "eval_size=0"),
        ("addition", {"eval_size": 1275}, "eval_size=1275"),
        ("addition", {"wrong_share": 1.5}, "wrong_share=1.5"),
        ("countdown", {"largest": 4}, "largest=4"),
    ],
)
def test_what_cannot_be_loaded_is_named(name, override, message):
    with pytest.raises(ValueError, match=message):
        toy_tasks.load(name, **override)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_prompts_are_disjoint_for_any_seed(name):
    task, canonical = toy_tasks.load(name, seed=2**32 - 1), MODULES[name].canonical
    train = {canonical(row["prompt"]) for row in task.train_prompts}
    assert not any(canonical(row["prompt"]) in train for row in task.eval_prompts)


def test_tasks_are_light_and_the_same_in_every_process_and_leave_the_global_random_state():
    code = """if True:
        import hashlib, random, sys, toy_tasks
        state = random.getstate()
        for name in toy_tasks.NAMES:
            task = toy_tasks.load(name)
            rows = repr((task.train_prompts, task.eval_prompts, task.demonstrations))
            print(name, hashlib.sha256(rows.encode()).hexdigest(), task.fingerprint, task.build.tokens)
        assert random.getstate() == state
        assert not {"torch", "transformers", "tokenizers", "numpy", "tokenrl"} & sys.modules.keys()
    """
    outputs = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


@every_task
def test_the_right_answer_earns_the_most_and_odd_ones_less(name):
    task = TASKS[name]
    pairs = [(prompt, right_answer(name, prompt)) for prompt in [*ROWS[name]][::7]]
    assert {*score(name, pairs)} == {BEST[name]}
    assert declared_range(task.reward, name) == (WORST[name], BEST[name])
    assert WORST[name] <= task.solved <= BEST[name] and MODULES[name].reward is task.reward
    prompt, right = pairs[0]
    odd = f"{right * 200_000}|{right + ' ' * 100_000}|{right}\n| {right}|\0|{'🙂' * 50}|٣|<unk>".split(
        "|"
    )
    odd += [right + "<unk>", right + prompt]
    if name == "target_length":  # any text of the right length is right
        odd = [text for text in odd if len(text) != len(right)]
    assert max(score(name, [(prompt, text) for text in odd])) < BEST[name]
    assert score(name, [(prompt, "")]) == [WORST[name]]
    columns = {key: [value] for key, value in ROWS[name][prompt].items()}
    with pytest.raises(ValueError, match="zip"):
        task.reward(columns.pop("prompt"), [], **columns)


@every_taught_task
def test_demonstrations_are_of_training_prompts_and_wrong_as_promised(name):
    rows = TASKS[name].demonstrations
    assert {row["prompt"] for row in rows} <= {row["prompt"] for row in TASKS[name].train_prompts}
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    pairs = [(row["prompt"], row["completion"]) for row in rows]
    if name == "addition":  # without a carry there is nothing to get wrong
        plain = [p for p in pairs if MODULES[name].without_carry(p[0]) == MODULES[name].right(p[0])]
        assert set(score(name, plain)) == {1.0}
        pairs = [p for p in pairs if p not in plain]
    share = 0.6 if name == "countdown" else 0.7
    assert (
        sum(reward < BEST[name] for reward in score(name, pairs)) == round(share * len(pairs)) > 100
    )
    right = toy_tasks.load(name, wrong_share=0.0).demonstrations
    assert set(score(name, [(row["prompt"], row["completion"]) for row in right])) == {BEST[name]}
