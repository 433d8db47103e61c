"""Makes preferences from a policy: samples pairs of completions and lets a gold reward choose, with noise.

The rows have TRL's columns `prompt`, `chosen` and `rejected`. Rankings of more than two are not supported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from tokenrl.errors import Refused
from tokenrl.files import write_text
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.agreement import checked_generator
from tokenrl.language.rollout.rewarded import sample_and_reward
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.tasks.rows import Row
from tokenrl.language.tasks.task import check_single_turn
from tokenrl.settings import check_number


def make_preferences(
    policy: Policy,
    prompts: Sequence[Row],
    gold_rewards: Any,
    sampling: Sampling,
    *,
    noise_temperature: float = 0.0,
    batch_size: int = 256,
) -> list[dict[str, Any]]:
    """Sample pairs of completions and let a gold reward choose, with noise (Bradley & Terry 1952).

        P(first chosen) = sigmoid((g_1 - g_2) / noise_temperature)

    At temperature 0 the better completion is always chosen, and pairs with equal gold rewards are left out.
    Above 0 a fair coin decides such a pair, as the formula says. Pairs of identical text, and pairs with a
    completion for which the gold reward abstained, are always left out.

    Args:
        policy: samples the completions.
        prompts: rows with a `prompt`; other columns reach the gold reward.
        gold_rewards: a `Rewards`, or one reward function or several.
        sampling: how completions are sampled. Two completions of a prompt make a pair, so `num_generations`
            must be even. Its seed is also the seed of the noise.
        noise_temperature: noise of the choice, in units of the gold reward.
        batch_size: completions sampled at a time; changes memory only.

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, `chosen_gold` and `rejected_gold`. If the prompt is chat
        messages, each completion is a list with the assistant's message.

    Raises:
        Refused: there are no prompts, a number is out of range, or every pair is left out.
        Stopped: the gold reward raised an error or returned something that is not a reward.
    """
    if not prompts:
        raise Refused(
            "There are no prompts to make preferences from: give at least one row with a prompt."
        )
    check_number("noise_temperature", noise_temperature, at_least=0)
    pairs = sampling.num_generations // 2
    if pairs < 1 or sampling.num_generations % 2:
        raise Refused(
            f"num_generations={sampling.num_generations}: two completions of a prompt make a pair, so give an "
            "even number of at least 2."
        )
    gold = gold_rewards if isinstance(gold_rewards, Rewards) else Rewards(gold_rewards)
    check_single_turn(gold, "A pair of completions")
    # One random number for every sampled pair, so that a pair left out does not shift those of the others.
    draws = np.random.default_rng([sampling.seed, 1]).random((len(prompts), pairs))
    rows = []
    generator = checked_generator(policy)
    for batch in sample_and_reward(
        policy, generator, prompts, gold, sampling, stream="preferences", batch_size=batch_size
    ):
        texts = policy.decode(batch.completion_ids, batch.mask)
        golds = batch.reward_list()
        for k in range(0, len(texts), 2):
            draw = draws[int(batch.prompt_index[k]), k // 2 % pairs]
            is_first = first_is_chosen(golds[k], golds[k + 1], noise_temperature, draw)
            if is_first is None or texts[k] == texts[k + 1]:
                continue
            chosen, rejected = (k, k + 1) if is_first else (k + 1, k)
            prompt = batch.data[k]["prompt"]
            row = {
                "prompt": prompt,
                "chosen": texts[chosen],
                "rejected": texts[rejected],
                "chosen_gold": golds[chosen],
                "rejected_gold": golds[rejected],
            }
            if not isinstance(prompt, str):
                for name in ("chosen", "rejected"):
                    row[name] = [{"role": "assistant", "content": row[name]}]
            rows.append(row)
    if not rows:
        raise Refused(
            f"None of {len(prompts) * pairs} sampled pairs can be used: they are equal, or equally good. Raise "
            "the temperature, or use a graded gold reward or another policy."
        )
    return rows


def first_is_chosen(
    first: float, second: float, noise_temperature: float, draw: float
) -> bool | None:
    """Decide from a uniform random number whether the first of two is chosen; None leaves the pair out."""
    with np.errstate(all="ignore"):  # without noise a difference is infinite, or nan
        logit = np.divide(first - second, noise_temperature)
    return None if np.isnan(logit) else draw < float(expit(logit))


def write_preferences(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, a format that `datasets` and `tokenrl reward-model --data` read."""
    lines = [json.dumps(dict(row), ensure_ascii=False, allow_nan=False) for row in rows]
    write_text(Path(path), "\n".join([*lines, ""]))
