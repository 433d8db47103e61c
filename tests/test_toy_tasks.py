"""What holds for every toy task: disjoint prompts, rewards in range, demonstrations wrong as promised."""

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

TASKS = {name: toy_tasks.load(name) for name in toy_tasks.NAMES}
MODULES = {name: importlib.import_module(f"toy_tasks.{name}") for name in toy_tasks.NAMES}
TAUGHT = [name for name, task in TASKS.items() if task.demonstrations]
BEST = dict.fromkeys(toy_tasks.NAMES, 1.0) | {"target_length": 0.0}
WORST = dict.fromkeys(toy_tasks.NAMES, 0.0) | {"target_length": -1.0}

every_task = pytest.mark.parametrize("name", toy_tasks.NAMES)
every_taught_task = pytest.mark.parametrize("name", TAUGHT)


def score(name, pairs):
    """Rewards of (prompt, completion) pairs, with the prompts' own columns."""
    task = TASKS[name]
    by_prompt = {row["prompt"]: row for row in task.train_prompts + task.eval_prompts}
    columns = {
        key: [by_prompt[prompt][key] for prompt, _ in pairs]
        for key in task.train_prompts[0]
        if key != "prompt"
    }
    return task.reward([prompt for prompt, _ in pairs], [text for _, text in pairs], **columns)


def right_answer(name, prompt):
    if name == "vowels":
        return "aeiou"
    if name == "sentiment":
        return " great."
    module = MODULES[name]
    return (
        module.write(prompt, module.asked_length(prompt)) if name == "target_length" else module.right(prompt)
    )


# Finding a task


def test_the_names_are_those_of_the_tasks():
    assert [TASKS[name].name for name in toy_tasks.NAMES] == list(toy_tasks.NAMES)
    assert toy_tasks.NAMES[0] == "sort_digits"
    assert {"sort_digits", "reverse_text", "addition", "countdown", "vowels", "sentiment"} < set(
        toy_tasks.NAMES
    )


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"sort_numbers.*sort_digits, reverse_text, .*target_length"):
        toy_tasks.load("sort_numbers")


def test_an_unknown_override_lists_the_arguments():
    with pytest.raises(ValueError, match="no argument colour; choose from: seed, digits, wrong_share"):
        toy_tasks.load("sort_digits", colour="red")


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("sort_digits", {"digits": 3}),
        ("sort_digits", {"digits": 17}),
        ("sort_digits", {"eval_size": 0}),
        ("addition", {"eval_size": 1275}),
        ("addition", {"wrong_share": 1.5}),
        ("sentiment", {"wrong_share": -0.1}),
        ("reverse_text", {"shortest": 7}),
        ("countdown", {"largest": 4}),
    ],
)
def test_an_override_out_of_range_is_named(name, override):
    [(key, value)] = override.items()
    with pytest.raises(ValueError, match=f"{key}={value}"):
        toy_tasks.load(name, **override)


def test_importing_the_package_is_light():
    heavy = ("torch", "transformers", "tokenizers", "numpy", "tokenrl")
    code = f"import sys, toy_tasks as t; t.load('countdown'); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# Prompts


@every_task
def test_held_out_prompts_share_no_canonical_form_with_training(name):
    task, canonical = TASKS[name], MODULES[name].canonical
    train = {canonical(row["prompt"]) for row in task.train_prompts}
    held_out = {canonical(row["prompt"]) for row in task.eval_prompts}
    assert not train & held_out
    assert not train & {canonical(row["prompt"]) for row in toy_tasks.load(name).eval_prompts}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(toy_tasks.NAMES))
def test_held_out_prompts_are_disjoint_for_any_seed(seed, name):
    task, canonical = toy_tasks.load(name, seed=seed), MODULES[name].canonical
    train = {canonical(row["prompt"]) for row in task.train_prompts}
    assert not any(canonical(row["prompt"]) in train for row in task.eval_prompts)


def test_canonical_forms_join_prompts_with_the_same_answer():
    assert MODULES["sort_digits"].canonical("402715>") == MODULES["sort_digits"].canonical("512704>")
    assert MODULES["reverse_text"].canonical("abcd>") == MODULES["reverse_text"].canonical("dcba>")
    assert MODULES["addition"].canonical("07+45>") == MODULES["addition"].canonical("45+07>")
    assert MODULES["countdown"].canonical("3,8,5=10>") == MODULES["countdown"].canonical("5,3,8=10>")
    assert MODULES["countdown"].canonical("3,8,5=10>") != MODULES["countdown"].canonical("3,8,5=0>")
    assert MODULES["vowels"].canonical("abc>") == MODULES["vowels"].canonical("cab>")
    assert MODULES["sentiment"].canonical("overall, the plot was") == "the plot was"
    assert MODULES["sentiment"].canonical("the plot was") == "the plot was"
    assert MODULES["target_length"].canonical("ab6>") == MODULES["target_length"].canonical("ba6>")


@every_task
def test_sizes_and_columns(name):
    task = TASKS[name]
    assert 128 <= len(task.eval_prompts) <= 256
    assert len(task.train_prompts) >= 200
    prompts = [row["prompt"] for row in task.train_prompts + task.eval_prompts]
    assert len(set(prompts)) == len(prompts) and all(prompts)
    assert len({tuple(row) for row in task.train_prompts + task.eval_prompts}) == 1
    assert {"prompts_per_step", "num_generations", "learning_rate", "max_steps", "eval_every"} <= set(
        task.train
    )
    assert task.description.endswith(".")


@every_task
def test_a_smaller_evaluation_set_on_request(name):
    assert 5 <= len(toy_tasks.load(name, eval_size=5).eval_prompts) <= 30


@every_task
def test_another_seed_gives_another_task(name):
    assert toy_tasks.load(name, seed=1).eval_prompts != TASKS[name].eval_prompts


def test_tasks_are_the_same_in_every_process_and_leave_the_global_random_state():
    code = """if True:
        import hashlib, random, toy_tasks
        state = random.getstate()
        for name in toy_tasks.NAMES:
            task = toy_tasks.load(name)
            rows = repr((task.train_prompts, task.eval_prompts, task.demonstrations))
            print(name, hashlib.sha256(rows.encode()).hexdigest(), task.fingerprint, task.build.tokens)
        assert random.getstate() == state
    """
    outputs = {
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


# Rewards and demonstrations


@every_task
def test_the_right_answer_earns_the_most_on_every_prompt(name):
    prompts = [row["prompt"] for row in TASKS[name].train_prompts + TASKS[name].eval_prompts]
    pairs = [(prompt, right_answer(name, prompt)) for prompt in prompts]
    assert set(score(name, pairs)) == {BEST[name]}
    assert declared_range(TASKS[name].reward, name) == (WORST[name], BEST[name])
    assert WORST[name] <= TASKS[name].solved <= BEST[name]


@settings(max_examples=40, deadline=None)
@given(text=st.text(), name=st.sampled_from(toy_tasks.NAMES), index=st.integers(0, 100))
def test_any_text_earns_a_float_in_range_by_itself(text, name, index):
    prompt = TASKS[name].eval_prompts[index]["prompt"]
    [alone] = score(name, [(prompt, text)])
    assert type(alone) is float and math.isfinite(alone) and WORST[name] <= alone <= BEST[name]
    others = [(prompt, ""), (prompt, text), (prompt, right_answer(name, prompt))]
    assert score(name, others)[1] == alone


@every_task
def test_huge_and_odd_completions_earn_less_than_the_right_one(name):
    prompt = TASKS[name].eval_prompts[0]["prompt"]
    right = right_answer(name, prompt)
    odd = [right * 200_000, right + " " * 100_000, right + "\n", " " + right, "\0", "🙂" * 50, "٣", "<unk>"]
    odd += [right + "<unk>", right + prompt]
    if name == "target_length":  # any text of the right length is right
        odd = [text for text in odd if len(text) != len(right)]
    assert max(score(name, [(prompt, text) for text in odd])) < BEST[name]
    assert score(name, [(prompt, "")]) == [WORST[name]]


@every_task
def test_a_missing_completion_is_an_error(name):
    row = TASKS[name].eval_prompts[0]
    columns = {key: [value] for key, value in row.items() if key != "prompt"}
    with pytest.raises(ValueError, match="zip"):
        TASKS[name].reward([row["prompt"]], [], **columns)


@every_task
def test_the_reward_is_importable_by_name_and_ignores_other_columns(name):
    assert MODULES[name].reward is TASKS[name].reward
    row = TASKS[name].eval_prompts[0]
    columns = {key: [value] for key, value in row.items() if key != "prompt"}
    MODULES[name].reward([row["prompt"]], ["x"], completion_ids=[[3]], trainer_state=None, **columns)


@every_taught_task
def test_the_promised_share_of_demonstrations_is_wrong(name):
    pairs = [(row["prompt"], row["completion"]) for row in TASKS[name].demonstrations]
    if name == "addition":  # without a carry there is nothing to get wrong
        plain = [p for p in pairs if MODULES[name].without_carry(p[0]) == MODULES[name].right(p[0])]
        assert set(score(name, plain)) == {1.0}
        pairs = [p for p in pairs if p not in plain]
    wrong = sum(reward < BEST[name] for reward in score(name, pairs))
    share = 0.6 if name == "countdown" else 0.7
    assert wrong == round(share * len(pairs)) > 100


@every_taught_task
def test_demonstrations_use_training_prompts_only_and_follow_the_wrong_share(name):
    train = {row["prompt"] for row in TASKS[name].train_prompts}
    assert all(set(row) == {"prompt", "completion"} for row in TASKS[name].demonstrations)
    assert all(row["prompt"] in train for row in TASKS[name].demonstrations)
    right = toy_tasks.load(name, wrong_share=0.0)
    by_prompt = [(row["prompt"], row["completion"]) for row in right.demonstrations]
    assert set(score(name, by_prompt)) == {BEST[name]}


def test_only_vowels_needs_no_demonstrations():
    assert [name for name, task in TASKS.items() if not task.demonstrations] == ["vowels"]
    assert [name for name, task in TASKS.items() if task.warm_start is None] == ["vowels"]


@every_task
def test_the_fingerprint_follows_what_the_warm_start_depends_on(name):
    task = TASKS[name]
    extra = {"prompt": "a", "completion": "b"}
    changed = [
        dataclasses.replace(task, demonstrations=[*task.demonstrations, extra]),
        dataclasses.replace(task, build=dataclasses.replace(task.build, hidden=64)),
        dataclasses.replace(task, build=dataclasses.replace(task.build, tokens=task.build.tokens[::-1])),
        dataclasses.replace(task, warm_start=toy_tasks.WarmStart(steps=7)),
    ]
    assert len({task.fingerprint, *(other.fingerprint for other in changed)}) == 5
    assert dataclasses.replace(task, solved=0.5, train={}).fingerprint == task.fingerprint
    json.dumps([task.fingerprint, task.train])  # both are written to a run's configuration
