"""Prompts kept by measured difficulty: the rates against a count by hand, the choice, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

import tokenrl
from tokenrl.errors import Refused
from tokenrl.language.policy.model import wrap
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.training.difficulty import filter_task, of_difficulty, success_rates
from toy_tasks.models import TinyModel

PROMPTS = [{"prompt": f"{x}{y}>"} for x in "abcd" for y in "abc"]


@pytest.fixture
def tiny():
    return wrap(*TinyModel(tuple("abcd>"), layers=1, hidden=16, heads=2, context=16)(0))


def starts_with_its_letter(prompts, completions, **_):
    return [float(text[:1] == prompt[0]) for prompt, text in zip(prompts, completions, strict=True)]


def make_task(reward=starts_with_its_letter):
    return SimpleNamespace(
        name="letters",
        train_prompts=PROMPTS,
        eval_prompts=[{"prompt": "ad>"}],
        reward=reward,
        max_completion_length=3,
    )


def test_rates_are_means_over_the_completions_that_have_a_reward(tiny):
    seen: dict[str, list] = {}

    def reward(prompts, completions):
        found = [
            None if text.startswith("d") else paid
            for text, paid in zip(completions, starts_with_its_letter(prompts, completions), strict=True)
        ]
        for prompt, paid in zip(prompts, found, strict=True):
            seen.setdefault(prompt, []).append(paid)
        return found

    rates = success_rates(tiny, PROMPTS, Rewards(reward), Sampling(3, 6), batch_size=18)
    assert [len(each) for each in seen.values()] == [6] * 12 and any(None in s for s in seen.values())
    for row, rate in zip(PROMPTS, rates, strict=True):
        known = [paid for paid in seen[row["prompt"]] if paid is not None]
        np.testing.assert_array_equal(rate, np.mean(known) if known else math.nan)
    again = success_rates(tiny, PROMPTS, Rewards(reward), Sampling(3, 6))
    np.testing.assert_array_equal(rates, again)  # the batch changes memory only
    other = success_rates(tiny, PROMPTS, Rewards(reward), Sampling(3, 6, seed=1))
    assert not np.array_equal(rates, other, equal_nan=True)
    silent = success_rates(tiny, PROMPTS[:2], Rewards(lambda **_: [None] * 6), Sampling(3, 3))
    assert np.isnan(silent).all()


def test_the_range_holds_both_ends_and_the_task_stays_as_it_was():
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        name: str
        train_prompts: list

    task = Frozen("frozen", PROMPTS[:5])
    kept = of_difficulty(task, np.array([0.0, 0.25, 0.5, 0.75, math.nan]), 0.25, 0.5)
    assert kept.train_prompts == PROMPTS[1:3] and task.train_prompts == PROMPTS[:5]
    every = of_difficulty(task, np.array([0.0, 0.25, 0.5, 0.75, math.nan]), -9.0, 9.0)
    assert every.train_prompts == PROMPTS[:4]  # never one of which nothing is known


def test_no_prompt_left_is_refused_with_what_was_measured():
    task = SimpleNamespace(name="hard", train_prompts=PROMPTS[:3])
    with pytest.raises(
        Refused, match=r"=0.2 0.8 leaves none of the 3 .*'hard'.* maximum are 0, 0, 0, 0.5, 1\."
    ):
        of_difficulty(task, np.array([0.0, 0.0, 1.0]), 0.2, 0.8)
    with pytest.raises(Refused, match="no completion had a reward"):
        of_difficulty(task, np.full(3, math.nan), 0.2, 0.8)


def test_filtering_says_what_it_kept_and_refuses_what_makes_no_sense(tiny):
    task, said = make_task(), []
    how = {"sampling": Sampling(3, 4), "announce": said.append}
    rewards = Rewards(task.reward)
    assert filter_task(task, tiny, rewards, within=None, **how) is task and said == []
    rates = success_rates(tiny, PROMPTS, rewards, Sampling(3, 4))
    kept = filter_task(task, tiny, rewards, within=(0.25, 1.0), **how)
    assert kept.train_prompts == [row for row, rate in zip(PROMPTS, rates, strict=True) if rate >= 0.25]
    assert 0 < len(kept.train_prompts) < 12 and kept.eval_prompts == task.eval_prompts
    assert said == [
        f"Kept {len(kept.train_prompts)} of 12 training prompts: those with a mean reward from 0.25 to 1 "
        "over 4 completions."
    ]
    for within, samples in (((0.8, 0.2), 4), ((math.nan, 1.0), 4), ((0.2, 0.8), 0)):
        with pytest.raises(Refused, match="give the least mean reward to keep"):
            filter_task(task, tiny, rewards, within=within, **how | {"sampling": Sampling(3, samples)})
    with pytest.raises(Refused, match=r"Before the first step: .*ZeroDivisionError"):
        filter_task(task, tiny, Rewards(lambda **_: 1 / 0), within=(0, 1), **how)


def test_a_run_trains_on_the_prompts_kept_and_says_how_many(tiny, tmp_path, capsys):
    seen = []

    def reward(prompts, completions):
        seen.append(set(prompts))
        return starts_with_its_letter(prompts, completions)

    options = {"max_steps": 2, "prompts_per_step": 2, "num_generations": 2, "eval_generations": 1}
    options |= {"output_dir": tmp_path / "run", "task": make_task(reward), "filter_samples": 4}
    rates = success_rates(tiny, PROMPTS, Rewards(starts_with_its_letter), Sampling(3, 4))
    tokenrl.train(model=tiny, filter_difficulty=(0.0, 0.0), **options)
    note = " ".join(capsys.readouterr().out.split())
    assert f"Kept {int((rates == 0).sum())} of 12 training prompts" in note and 0 < (rates == 0).sum() < 12
    kept = {row["prompt"] for row, rate in zip(PROMPTS, rates, strict=True) if rate == 0}
    assert seen[0] == {row["prompt"] for row in PROMPTS} and set().union(*seen[1:]) <= {*kept, "ad>"}
    with pytest.raises(Refused, match="leaves none of the 12"):
        tokenrl.train(model=tiny, filter_difficulty=(2.0, 3.0), overwrite=True, **options)
