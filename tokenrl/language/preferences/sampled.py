"""Preferences made from a policy: pairs of its completions, of which a gold reward chooses one, with noise.

The rows have TRL's columns `prompt`, `chosen`, `rejected`. Rankings of more than two are left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.judged import judged
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.settings import check_number

Row = Mapping[str, Any]


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

    At temperature 0 the better one is always chosen and pairs of equal gold reward are left out; above 0 a
    fair coin decides those, as the formula has it. Pairs of identical text, or with a completion from which
    the gold reward abstained, are always left out.

    Args:
        policy: whose completions are compared.
        prompts: rows with a `prompt`; other columns reach the gold reward.
        gold_rewards: a `Rewards`, or what it is made of: one reward function or several.
        sampling: how to sample; two of the completions of a prompt make a pair, so their number is even. The
            seed is that of the noise too.
        noise_temperature: in units of the gold reward.
        batch_size: completions sampled at a time; changes memory only.

    Returns:
        Rows of `prompt`, `chosen`, `rejected`, `chosen_gold`, `rejected_gold`; where the prompt is chat
        messages, a completion is a list with the assistant's message.

    Raises:
        Refused: no prompts, a number out of range, or no pair to choose from.
        Stopped: the gold reward raised or returned what is no reward.
    """
    if not prompts:
        raise Refused("There are no prompts to make preferences from: give at least one row with a prompt.")
    check_number("noise_temperature", noise_temperature, at_least=0)
    pairs, left_over = divmod(sampling.num_generations, 2)
    if pairs < 1 or left_over:
        raise Refused(
            f"num_generations={sampling.num_generations}: two completions of a prompt make a pair, so give "
            "an even number, 2 or more."
        )
    gold = gold_rewards if isinstance(gold_rewards, Rewards) else Rewards(gold_rewards)
    # One uniform for each pair sampled, so that what is left out moves nobody's noise.
    noise = np.random.default_rng([sampling.seed, 1]).random((len(prompts), pairs))
    rows: list[dict[str, Any]] = []
    for places, rollout, result in judged(
        policy, prompts, gold, sampling, stream="preferences", batch_size=batch_size
    ):
        texts = policy.decode(rollout.completion_ids, rollout.mask)
        golds = [g if ok else math.nan for g, ok in zip(result.total.tolist(), result.valid, strict=True)]
        for k in range(0, len(texts), 2):
            place, pair = divmod(k // 2, pairs)
            first = first_is_chosen(golds[k], golds[k + 1], noise_temperature, noise[places[place], pair])
            if first is not None and texts[k] != texts[k + 1]:
                chosen, rejected = (k, k + 1) if first else (k + 1, k)
                rows.append(_row(prompts[places[place]]["prompt"], texts, golds, chosen, rejected))
    if not rows:
        raise Refused(
            f"None of {len(prompts) * pairs} sampled pairs can be told apart: the policy repeats "
            "itself, or the gold reward finds all its completions equal. Raise the sampling temperature, use "
            "a graded gold reward, or another policy."
        )
    return rows


def first_is_chosen(first: float, second: float, noise_temperature: float, draw: float) -> bool | None:
    """Whether the first of two gold rewards is chosen, given a uniform draw; None where nothing decides."""
    difference = first - second
    if math.isnan(difference) or (noise_temperature == 0 and difference == 0):
        return None
    if noise_temperature == 0:
        return difference > 0
    # sigmoid(x) = (1 + tanh(x / 2)) / 2, which overflows nowhere
    return draw < 0.5 * (1 + math.tanh(difference / noise_temperature / 2))


def _row(
    prompt: Any, texts: Sequence[str], golds: Sequence[float], chosen: int, rejected: int
) -> dict[str, Any]:
    answers: list[Any] = [texts[chosen], texts[rejected]]
    if not isinstance(prompt, str):
        answers = [[{"role": "assistant", "content": text}] for text in answers]
    golden = {"chosen_gold": golds[chosen], "rejected_gold": golds[rejected]}
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], **golden}


def write_preferences(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, which `datasets` and `tokenrl reward-model --data` read."""
    lines = [json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8")
