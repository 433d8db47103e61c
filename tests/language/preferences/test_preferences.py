"""Preferences: choices as often as the formula says, rows that others read, splits that share no prompt."""

import math

import numpy as np
import pytest
from refusals import refused
from tiny_models import PROMPTS, make_policy

from tokenrl.language.preferences.pairs import Pair, divided, load_pairs, read_pairs
from tokenrl.language.preferences.sampled import (
    first_is_chosen,
    make_preferences,
    write_preferences,
)
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.tasks.task import load_task

SIZES = {"sampling": Sampling(5, 6, seed=4)}


def gold(completions, **_):
    """A function of the text alone, so that a row can be checked against what it holds."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ord(character) for character in text) % 7 / 3 for text in texts]


def rows_of(words):
    return [{"prompt": word} for word in words]


@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0])
def test_the_better_one_is_chosen_as_often_as_the_formula_says(noise):
    draws = (np.arange(20_000) + 0.5) / 20_000  # a uniform random number, without chance
    for difference in (-2.0, -0.5, 0.0, 0.1, 1.5):
        share = np.mean([first_is_chosen(3.0 + difference, 3.0, noise, draw) for draw in draws])
        assert share == pytest.approx(1 / (1 + math.exp(-difference / noise)), abs=1e-4)


def test_made_preferences_hold_the_gold_rewards_of_their_texts():
    prompts = rows_of([f"{word} {n}" for word in PROMPTS for n in range(5)])
    noisy = make_preferences(make_policy(), prompts, gold, noise_temperature=0.8, **SIZES)
    exact = make_preferences(make_policy(), prompts, gold, **SIZES)
    for row in noisy + exact:
        assert set(row) == {"prompt", "chosen", "rejected", "chosen_gold", "rejected_gold"}
        assert row["chosen"] != row["rejected"]
        assert [row["chosen_gold"], row["rejected_gold"]] == gold([row["chosen"], row["rejected"]])
    assert 50 < len(noisy) <= 60 and len({row["prompt"] for row in noisy}) == len(prompts)
    # With noise ties are kept, decided by a coin, and some better completions are rejected.
    signs = {np.sign(row["chosen_gold"] - row["rejected_gold"]) for row in noisy}
    assert signs == {-1, 0, 1}
    assert len(exact) > 30 and all(row["chosen_gold"] > row["rejected_gold"] for row in exact)


@pytest.mark.parametrize(("prompts", "generations"), [(20, 2), (1, 40)])
def test_every_pair_has_a_random_number_of_its_own(prompts, generations):
    def first_is_better(completions, **_):
        return [1.0, 0.0] * (len(completions) // 2)

    rows = make_preferences(
        make_policy(),
        rows_of(["the cat"] * prompts),
        first_is_better,
        Sampling(8, generations, seed=4),
        noise_temperature=1e6,  # so that a coin decides
    )
    assert {row["chosen_gold"] for row in rows} == {0.0, 1.0}


def test_pairs_with_an_abstention_are_left_out():
    def abstains(completions, use, **_):
        return [g if ok else None for g, ok in zip(gold(completions), use, strict=True)]

    prompts = [{"prompt": prompt, "use": i % 2 == 0} for i, prompt in enumerate(PROMPTS)]
    rows = make_preferences(
        make_policy(), prompts, Rewards(abstains), noise_temperature=1.0, **SIZES
    )
    assert {row["prompt"] for row in rows} == {PROMPTS[0], PROMPTS[2]}


@pytest.mark.parametrize("kind", ["pad", "chat"])
def test_written_preferences_are_read_by_datasets_and_by_us(kind, tmp_path):
    import datasets

    prompts = rows_of(PROMPTS * 2)
    if kind == "chat":
        prompts = rows_of([[{"role": "user", "content": word}] for word in PROMPTS])
    rows = make_preferences(make_policy(kind=kind), prompts, gold, **SIZES)
    path = str(tmp_path / "preferences.jsonl")
    write_preferences(path, rows)
    options = {"data_files": path, "split": "train", "cache_dir": str(tmp_path / "cache")}
    assert datasets.load_dataset("json", **options).to_list() == rows
    train, held_out, _ = load_pairs(path)
    assert len(held_out) >= 2
    pairs = [(pair.prompt, pair.chosen, pair.rejected, *pair.gold) for pair in train + held_out]
    assert sorted(map(str, pairs)) == sorted(str(tuple(row.values())) for row in rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": []}, "no prompts"),
        ({"sampling": Sampling(5, 3)}, "num_generations=3.* even number"),
        (
            {"gold_rewards": lambda completions, **_: [1.0] * len(completions)},
            "None of 12 sampled pairs",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(changes, words):
    options = {"prompts": rows_of(PROMPTS), "gold_rewards": gold} | SIZES | changes
    with refused(words):
        make_preferences(make_policy(), **options)


USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "a"), ("assistant", "b"))
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": " a", "rejected": " b"}, ("p", " a", " b")),
        (
            {"chosen": "the sky is blue", "rejected": "the sky is bright"},
            ("the sky is", " blue", " bright"),
        ),
        ({"prompt": None, "chosen": "a b", "rejected": "a b c"}, ("a", " b", " b c")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ([USER], [GOOD], [BAD])),
        (
            {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            ([USER], [GOOD], [BAD]),
        ),
    ],
)
def test_the_forms_of_a_pair(row, expected):
    assert read_pairs([row], "data") == [Pair(*expected)]


def test_margins_and_gold_rewards_are_read_and_identical_pairs_left_out():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}
    row |= {"chosen_gold": 1, "rejected_gold": 0.5}
    pairs = read_pairs([row, row | {"rejected": "a"}], "data")
    assert pairs == [Pair("p", "a", "b", 2.0, (1.0, 0.5))]


P = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "data is empty"),
        ([{"prompt": "p", "completion": "a", "label": True}], "no column 'chosen'"),
        ([{"chosen": "a", "reject": "b"}], "no column 'rejected'.*Did you mean 'reject'"),
        ([P | {"rejected": "a"}] * 3, "identical in every one of the 3 rows"),
        ([P | {"chosen": None}], "row 0: the chosen is None"),
        ([P | {"rejected": [BAD]}], "some of prompt, chosen and rejected are text"),
        ([P | {"chosen": [GOOD], "rejected": [BAD]}], "Give them alike"),
        ([P | {"margin": "big"}], "row 0: margin was given as 'big'"),
    ],
)
def test_rows_that_are_no_preferences_are_refused(rows, words):
    with refused(words):
        read_pairs(rows, "data")


def test_held_out_pairs_share_no_prompt_with_the_others():
    pairs = [Pair(f"p{i % 50}", f"a{i}", "b") for i in range(200)]
    train, held_out, words = divided(pairs, 200)
    prompts = {pair.prompt for pair in held_out}
    assert 20 <= len(held_out) == 4 * len(prompts) <= 80 and "whole prompts" in words
    assert {pair.prompt for pair in train}.isdisjoint(prompts) and len(train + held_out) == 200
    # the same prompts as those of a task are held out
    task = load_task(rows_of([f"p{i}" for i in range(50)]), reward=gold)
    assert {row["prompt"] for row in task.eval_prompts} == prompts
    assert divided(pairs, 3)[:2] == (train, held_out[:3])
    uneven = [Pair("p", "a", "b"), *(Pair("q", f"a{i}", "b") for i in range(99))]
    most, rest, words = divided(uneven, 5)
    assert rest and len(most) >= 50 and "single rows" in words
    with refused("at least 2 pairs"):
        divided(uneven[:1], 1)
