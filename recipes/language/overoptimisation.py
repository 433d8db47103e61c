"""Measures over-optimisation: when RL or best-of-n maximises a reward model, the gold reward may fall.

The gold reward is a rule. A film review gets 1 for each favourable word and -1 for each unfavourable one. But
a balance above 2 is gushing: each further word costs 2; the reward is at least -4. RL sees only a reward
model, trained on 300 pairs of the base policy's reviews that the gold reward labelled, with noise
(temperature 0.5). The base gushes in 1 review of 20, so the pairs hardly show it.

RL is RLOO with a KL weight of 1e-3, which only makes the run measure the KL (k1 of fresh samples). Best-of-n
takes the proxy's choice among n samples of a pool of the base: gold without bias by order statistics, KL from
the shares of the pool. Proxy and gold are given as gains over the base, in its standard deviations, by
d = sqrt(KL).

Seeds differ in pairs, head and samples; the base and its pool are shared. A seed falls if its gold ends 0.25
below its best, and its proxy above its value there; "d of turn" is where those seeds were best. Gold and
proxy "after" are changes to the end in all seeds, each from where the mean of the OTHER seeds is best, so
that noise does not choose the peak. Intervals are 95 %, Student's t over seeds.

Look for: gold that falls while the proxy still rises, under RL with most seeds. The results are in
recipes/README.md, section "Reward models".
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from scipy import stats

import toy_tasks
from tokenrl import RewardModel, load_policy, train
from tokenrl.language import (
    Pair,
    RewardModelArguments,
    Sampling,
    best_of_n,
    encode_pairs,
    fit_reward_model,
    make_preferences,
    preference_metrics,
    read_pairs,
    reward_backbone,
    score_pairs,
    warm_started_base,
)
from tokenrl.runs import read_metrics
from toy_tasks.sentiment import balance

BLUE, ORANGE = "#0072B2", "#D55E00"
Pool = list[np.ndarray]  # by prompt, [N]
MAX_TOKENS = 16  # of a review
POLICY_WIDTH, JUDGE_WIDTH = 64, 128
SAMPLED_PAIRS, PAIRS = (
    2000,
    300,
)  # of each seed's sampled pairs the reward model learns from the first
STEPS_PER_POINT = 5  # RL steps averaged to a point
RUNS = Path("runs/overoptimisation")
MIN_FALL = 0.25  # a seed falls if it loses more gold than this after the turn; a point's error is below 0.08


def gold(completions: Sequence[str], **_: Any) -> list[float]:
    """Favourable less unfavourable words up to 2; beyond that each costs 2; at least -4."""
    balances = [balance(text) for text in completions]
    return [float(max(-4, min(b, 6 - 2 * b))) for b in balances]


@dataclass
class Base:
    """The policy that every run starts from, and what is sampled from it once."""

    task: toy_tasks.Task
    path: str
    gold: Pool  # the gold rewards of N samples for each of 8 held-out prompts


def standardise(values: Any, pool: Pool) -> np.ndarray:
    """Standardise values by mean and standard deviation of the rewards of the base's samples."""
    rewards = np.concatenate(pool)
    return (np.asarray(values) - rewards.mean()) / max(rewards.std(), 1e-9)


def narrow(hidden: int) -> toy_tasks.Task:
    """The sentiment task with a tiny model of one layer of this width."""
    task = toy_tasks.load("sentiment")
    return replace(task, build=replace(task.build, layers=1, hidden=hidden))


def sample_pairs(base: Base, rows: Sequence[Any], per_prompt: int, seed: int) -> list[Pair]:
    """Pairs of the base's reviews of these prompts, labelled by the gold reward with noise."""
    sampling = Sampling(MAX_TOKENS, num_generations=2 * per_prompt, seed=seed)
    policy = load_policy(base.path)
    preferences = make_preferences(policy, rows, gold, sampling, noise_temperature=0.5)
    return read_pairs(preferences, "the sampled pairs")


def train_judge(base: Base, seed: int) -> RewardModel:
    """A reward model on a warm-started backbone, after 40 updates; prints its held-out accuracy."""
    prompts = base.task.train_prompts
    per_prompt = math.ceil(1.1 * SAMPLED_PAIRS / len(prompts))  # some pairs are of one text
    pairs = sample_pairs(base, prompts, per_prompt, 2 * seed)
    order = np.random.default_rng(seed).permutation(len(pairs))[:PAIRS]
    judge = reward_backbone(load_policy(str(warm_started_base(narrow(JUDGE_WIDTH)))), seed=seed)
    judge.batch_size = 256
    options = RewardModelArguments(
        max_steps=40, batch_size=32, learning_rate=1e-3, eval_every=40, seed=seed
    )
    fit_reward_model(judge, [pairs[i] for i in order], options)
    held_out = sample_pairs(base, base.task.eval_prompts, 5, 2 * seed + 1)
    metrics = preference_metrics(score_pairs(judge, encode_pairs(judge, held_out)), held_out)
    accuracy = "accuracy {accuracy:.3f} of {noise_ceiling:.3f}".format(**metrics)
    print(f"seed {seed}: {accuracy}", flush=True)
    return judge


def pool_rewards(reward: Any, rows: Sequence[Any], pool: Sequence[Sequence[str]]) -> Pool:
    """Rewards of the texts of each prompt; one that occurs several times is scored once."""
    rewards = []
    for row, texts in zip(rows, pool, strict=True):
        of_texts, distinct = pd.factorize(np.array(texts, dtype=object))
        values = reward(prompts=[row["prompt"]] * len(distinct), completions=distinct.tolist())
        rewards.append(np.array(values, dtype=np.float64)[of_texts])
    return rewards


def best_of(base: Base, proxies: Pool) -> np.ndarray:
    """KL, proxy and gold of best-of-n for n = 1, 2, 4 ..., [points, 3]; means over prompts."""
    points = []
    for k in range(int(math.log2(len(base.gold[0])))):
        rows = []  # of a prompt
        for proxy, gold in zip(proxies, base.gold, strict=True):
            weights = best_of_n.choice_weights(proxy, 2**k)
            gains = standardise(proxy, proxies), standardise(gold, base.gold)
            rows.append([best_of_n.best_of_n_kl(proxy, 2**k), *(weights @ gain for gain in gains)])
        points.append(np.mean(rows, axis=0))
    return np.array(points)


def pursue(judge: RewardModel, base: Base, proxies: Pool, max_steps: int, seed: int) -> np.ndarray:
    """KL, proxy and gold of fresh samples along an RL run, [points, 3]; gold has weight 0."""

    def proxy(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return standardise(judge(prompts, completions), proxies).tolist()

    result = train(
        task=base.task, model=base.path, reward=(proxy, gold), reward_weights=(1.0, 0.0),
        estimator="rloo,beta=1e-3", max_steps=max_steps,
        learning_rate=3e-4, lr_scheduler_type="constant", eval_every=0, eval_generations=1,
        log_completions=0, stop_after_zero_spread=0, seed=seed,
        output_dir=str(RUNS / f"seed_{seed}"), overwrite=True, quiet=True,
    )  # fmt: skip
    if result.exit_code:  # a signal ended the run; it is meant for the whole program
        raise SystemExit(result.exit_code)
    metrics = pd.DataFrame(read_metrics(result.output_dir / "metrics.jsonl")[1:])
    points = metrics[["kl", "rewards/proxy/mean", "rewards/gold/mean"]].to_numpy(copy=True)
    points[:, 2] = standardise(points[:, 2], base.gold)
    whole = max_steps // STEPS_PER_POINT * STEPS_PER_POINT
    return points[:whole].reshape(-1, STEPS_PER_POINT, 3).mean(axis=1)


def mean_of(values: np.ndarray) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % interval; nan where there are too few."""
    half = stats.t.ppf(0.975, len(values) - 1) * pd.Series(values).sem()
    return pd.Series(values).mean(), half


def turn(d: np.ndarray, proxy: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
    """Where gold is best, and what follows; square roots of the KL and gains, [seeds, points]."""
    seeds = range(len(gold))
    other_seeds = [[s for s in seeds if s != seed] or [seed] for seed in seeds]
    turns = np.array([gold[rows].mean(axis=0).argmax() for rows in other_seeds])
    best = gold.argmax(axis=1)
    lost, won = (values[:, -1] - values[seeds, best] for values in (gold, proxy))
    fell = (lost < -MIN_FALL) & (won > 0)
    changes = {
        name: mean_of(values[:, -1] - values[seeds, turns])
        for name, values in (("gold", gold), ("proxy", proxy))
    }
    return {"d": mean_of(d[seeds, best][fell]), "fell": int(fell.sum())} | changes


def draw(curves: dict[str, tuple[np.ndarray, ...]], turns: dict[str, dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(4.5 * len(curves), 4.4), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for axes, (method, curve) in zip(panels, curves.items(), strict=True):
        d, *gains = curve
        for values, colour, name in zip(gains, (ORANGE, BLUE), ("proxy", "gold"), strict=True):
            axes.plot(d.T, values.T, color=colour, linewidth=0.6, alpha=0.35)
            axes.plot(d.mean(0), values.mean(0), color=colour, linewidth=2.2, label=name)
        fallen = f"{turns[method]['fell']} of {len(d)} fall"
        axes.set_title(f"{method}: {fallen}", fontsize=10, loc="left")
        axes.set(xlabel="sqrt(KL to the base), sqrt(nats)", xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("gain on the base (its s.d.); thin: a seed")
    figure.axes[0].legend(frameon=False)
    return figure


def main(
    seeds: int = 6,
    max_steps: int = 150,
    pool: int = 2048,
) -> None:
    """Maximise a reward model of 300 pairs for each seed, by RL and by best-of-n.

    Args:
        seeds: Reward models and RL runs.
        max_steps: Steps of an RL run.
        pool: Samples of the base for each of 8 held-out prompts; n goes up to half of that.
    """
    task = narrow(POLICY_WIDTH)
    path = str(warm_started_base(task))
    rows = task.eval_prompts[:: len(task.eval_prompts) // 8][:8]
    sampling = Sampling(MAX_TOKENS, num_generations=pool)
    texts = best_of_n.sample_pool(load_policy(path), [row["prompt"] for row in rows], sampling)
    base = Base(task, path, pool_rewards(gold, rows, texts))
    points = {"rloo": [], "best-of-n": []}
    for seed in range(seeds):
        judge = train_judge(base, seed)
        proxies = pool_rewards(judge, rows, texts)
        points["rloo"].append(pursue(judge, base, proxies, max_steps, seed))
        points["best-of-n"].append(best_of(base, proxies))
    curves, turns = {}, {}
    print(f"\n{'':33}d of turn      gold after    proxy after  fell")
    for method, of_seeds in points.items():
        kl, proxy, gain = np.moveaxis(np.array(of_seeds), 2, 0)
        # an estimate of a KL near 0 can be negative
        curves[method] = np.sqrt(np.maximum(kl, 1e-4)), proxy, gain
        row = turns[method] = turn(*curves[method])
        numbers = " ".join("{:6.2f} ± {:.2f}".format(*row[key]) for key in ("d", "gold", "proxy"))
        print(f"{method:>30} {numbers} {row['fell']:6}")
    draw(curves, turns).savefig(RUNS / "overoptimisation.png")
    print(f"figure: {RUNS / 'overoptimisation.png'}")


if __name__ == "__main__":
    tyro.cli(main)
