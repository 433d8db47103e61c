"""What holds for every toy task of one turn: disjoint prompts, rewards in range, wrong demonstrations."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies as st

import toy_tasks
from tokenrl.language.rewards.loading import declared_range

LOADED = {name: toy_tasks.load(name) for name in toy_tasks.NAMES}
TASKS = {name: task for name, task in LOADED.items() if task.environment is None}
NAMES = tuple(TASKS)
MODULES = {name: importlib.import_module(f"toy_tasks.{name}") for name in NAMES}
TAUGHT = [name for name, task in TASKS.items() if task.demonstrations]
BEST = dict.fromkeys(NAMES, 1.0) | {"target_length": 0.0}
WORST = dict.fromkeys(NAMES, 0.0) | {"target_length": -1.0}
USUAL = {"prompts_per_step", "num_generations", "learning_rate", "max_steps", "eval_every"}

every_task = pytest.mark.parametrize("name", NAMES)
every_taught_task = pytest.mark.parametrize("name", TAUGHT)


def score(name, pairs):
    """Rewards of (prompt, completion) pairs, with the prompts' own columns and some that trainers add."""
    task = TASKS[name]
    rows = {row["prompt"]: row for row in task.train_prompts + task.eval_prompts}
    columns = {key: [rows[prompt][key] for prompt, _ in pairs] for key in task.train_prompts[0]}
    prompts = columns.pop("prompt")
    details = {"completion_ids": [[3]] * len(pairs), "trainer_state": None}
    return task.reward(prompts, [text for _, text in pairs], **columns, **details)


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
        ("sort_digits", {"digits": 17}, "digits=17"),
        ("sort_digits", {"eval_size": 0}, "eval_size=0"),
        ("addition", {"eval_size": 1275}, "eval_size=1275"),
        ("addition", {"wrong_share": 1.5}, "wrong_share=1.5"),
        ("sentiment", {"wrong_share": -0.1}, "wrong_share=-0.1"),
        ("reverse_text", {"shortest": 7}, "shortest=7"),
        ("countdown", {"largest": 4}, "largest=4"),
        ("guess_number", {"turns": 7}, "turns=7"),
        ("calculator", {"wrong_share": 2}, "wrong_share=2"),
        ("calculator", {"eval_size": 0}, "eval_size=0"),
    ],
)
def test_what_cannot_be_loaded_is_named(name, override, message):
    with pytest.raises(ValueError, match=message):
        toy_tasks.load(name, **override)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(NAMES))
def test_held_out_prompts_are_disjoint_for_any_seed(seed, name):
    task, canonical = toy_tasks.load(name, seed=seed), MODULES[name].canonical
    train = {canonical(row["prompt"]) for row in task.train_prompts}
    assert not any(canonical(row["prompt"]) in train for row in task.eval_prompts)


def test_canonical_forms_join_prompts_with_the_same_answer():
    for name, item, equal in (
        ("sort_digits", "402715>", "512704>"),
        ("reverse_text", "abcd>", "dcba>"),
        ("addition", "07+45>", "45+07>"),
        ("countdown", "3,8,5=10>", "5,3,8=10>"),
        ("vowels", "abc>", "cab>"),
        ("sentiment", "overall, the plot was", "the plot was"),
        ("target_length", "ab6>", "ba6>"),
    ):
        assert MODULES[name].canonical(item) == MODULES[name].canonical(equal), name
    assert MODULES["countdown"].canonical("3,8,5=10>") != MODULES["countdown"].canonical("3,8,5=0>")


@every_task
def test_sizes_columns_and_what_other_arguments_change(name):
    task, canonical = TASKS[name], MODULES[name].canonical
    assert task.name == name and task.description.endswith(".") and set(task.train) >= USUAL
    assert 128 <= len(task.eval_prompts) <= 256 and len(task.train_prompts) >= 200
    prompts = [row["prompt"] for row in task.train_prompts + task.eval_prompts]
    assert len(set(prompts)) == len(prompts) and all(prompts)
    assert len({tuple(row) for row in task.train_prompts + task.eval_prompts}) == 1
    held_out = {canonical(row["prompt"]) for row in task.eval_prompts}
    assert held_out.isdisjoint(canonical(row["prompt"]) for row in task.train_prompts)
    second = toy_tasks.load(name, seed=1, eval_size=5)
    assert 5 <= len(second.eval_prompts) <= 30
    assert not {row["prompt"] for row in second.eval_prompts} <= {
        row["prompt"] for row in task.eval_prompts
    }
    assert (task.warm_start is None) == (not task.demonstrations) == (name == "vowels")


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
    prompts = [row["prompt"] for row in (task.train_prompts + task.eval_prompts)[::7]]
    assert set(score(name, [(prompt, right_answer(name, prompt)) for prompt in prompts])) == {
        BEST[name]
    }
    assert declared_range(task.reward, name) == (WORST[name], BEST[name])
    assert WORST[name] <= task.solved <= BEST[name] and MODULES[name].reward is task.reward
    prompt = task.eval_prompts[0]["prompt"]
    right = right_answer(name, prompt)
    odd = [
        right * 200_000,
        right + " " * 100_000,
        right + "\n",
        " " + right,
        "\0",
        "🙂" * 50,
        "٣",
        "<unk>",
    ]
    odd += [right + "<unk>", right + prompt]
    if name == "target_length":  # any text of the right length is right
        odd = [text for text in odd if len(text) != len(right)]
    assert max(score(name, [(prompt, text) for text in odd])) < BEST[name]
    assert score(name, [(prompt, "")]) == [WORST[name]]
    columns = {key: [value] for key, value in task.eval_prompts[0].items()}
    with pytest.raises(ValueError, match="zip"):
        task.reward(columns.pop("prompt"), [], **columns)


@settings(max_examples=40, deadline=None)
@given(text=st.text(), name=st.sampled_from(NAMES), index=st.integers(0, 100))
def test_any_text_earns_a_float_in_range_by_itself(text, name, index):
    prompt = TASKS[name].eval_prompts[index]["prompt"]
    [alone] = score(name, [(prompt, text)])
    assert type(alone) is float and math.isfinite(alone) and WORST[name] <= alone <= BEST[name]
    batch = [(prompt, ""), (prompt, text), (prompt, right_answer(name, prompt))]
    assert score(name, batch)[1] == alone


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


def test_the_fingerprint_follows_what_the_warm_start_depends_on():
    task = TASKS["sort_digits"]
    extra = {"prompt": "a", "completion": "b"}
    changed = [
        dataclasses.replace(task, demonstrations=[*task.demonstrations, extra]),
        dataclasses.replace(task, build=dataclasses.replace(task.build, hidden=64)),
        dataclasses.replace(
            task, build=dataclasses.replace(task.build, tokens=task.build.tokens[::-1])
        ),
        dataclasses.replace(task, warm_start=toy_tasks.WarmStart(steps=7)),
    ]
    assert len({task.fingerprint, *(variant.fingerprint for variant in changed)}) == 5
    assert dataclasses.replace(task, solved=0.5, train={}).fingerprint == task.fingerprint
    for item in LOADED.values():
        json.dumps([item.fingerprint, item.train])  # both are written to a run's configuration
