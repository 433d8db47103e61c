"""Measures over-optimisation: when RL or best-of-n maximises a reward model, the gold reward may fall.

The gold reward is a rule. A film review gets 1 for each favourable word and -1 for each unfavourable one. But
a balance above 2 is gushing: each further word costs 2; the reward is at least -4. RL sees only a reward
model, trained on pairs of the base policy's reviews that the gold reward labelled, with noise (temperature
0.5). The base gushes in 1 review of 20, so the pairs hardly show it.

RL is RLOO with a KL weight of 1e-3, which only makes the run measure the KL (k1 of fresh samples). Best-of-n
takes the proxy's choice among n samples of a pool of the base: gold without bias by order statistics, KL from
the shares of the pool. Proxy and gold are given as gains over the base, in its standard deviations.
With d = sqrt(KL), the forms of Gao, Schulman and Hilton 2022 (arXiv 2210.10760) are fitted to the gain in
gold by least squares over all seeds: d (alpha - beta d) for best-of-n, d (alpha - beta log d) for RL.

Seeds differ in pairs, head and samples; the base and its pool are shared. A seed falls if its gold ends 0.25
below its best, and its proxy above its value there; "d of turn" is where those seeds were best. Gold and
proxy "after" are changes to the end in all seeds, each from where the mean of the OTHER seeds is best, so
that noise does not choose the peak. Intervals are 95 %, Student's t over seeds.

By default (7 minutes on one core), seeds of 6 that fall under RL, under best-of-n, and held-out accuracy
(gold itself: 0.87): 16:300 2, 1, 0.79; 64:300 3, 4, 0.82; 128:300 5, 2, 0.81; 64:50 2, 1, 0.69; 64:2000 4, 1,
0.84. 128:300 under RL turns at d = 2.34 ± 0.66: after it gold loses 1.19 ± 1.24 and the proxy gains 0.72 ±
0.16. No mean loss is significant with six seeds, for a seed either gushes or settles at two points. So six
seeds do not show that width, data or accuracy protects: with the least accurate models the fewest fall.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

import toy_tasks
from tokenrl import Estimator, RewardModel, load_policy, train
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
from tokenrl.runs import read_metrics, write_json
from toy_tasks.sentiment import balance

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8A8A8A"
Pool = list[np.ndarray]  # by prompt, [N]
Key = tuple[str, str]  # width:pairs of the reward model, RL or best-of-n
MAX_TOKENS = 16  # of a review
POLICY_WIDTH = 64
STEPS_PER_POINT = 5  # RL steps averaged to a point
MIN_FALL = 0.25  # a seed falls if it loses more gold than this after the turn; a point's error is below 0.08
METHODS = ("RL", "best-of-n")


@dataclass(frozen=True)
class Args:
    """Reward models of several sizes and amounts of data, maximised by RL and by best-of-n."""

    configurations: tuple[str, ...] = ("16:300", "64:300", "128:300", "64:50", "64:2000")
    """Reward models, as width:pairs."""
    seeds: int = 6
    """Reward models and RL runs per configuration."""
    max_steps: int = 150
    """Steps of an RL run."""
    pool: int = 2048
    """Samples of the base for each of 8 held-out prompts; n goes up to half of that."""
    output_dir: Path = Path("runs/overoptimisation")
    """Directory of the runs, results.json and the figure."""


def gold(completions: Sequence[str], **_: Any) -> list[float]:
    """Favourable less unfavourable words up to 2; beyond that each costs 2; at least -4."""
    balances = [balance(text) for text in completions]
    return [float(max(-4, min(b, 6 - 2 * b))) for b in balances]


@dataclass
class Base:
    """The policy that every run starts from, and what is sampled from it once."""

    task: toy_tasks.Task
    path: str
    rows: list[dict[str, Any]]  # 8 held-out prompts
    texts: list[list[str]]  # for each of them, N samples
    gold: Pool  # the gold rewards of the samples


def columns(d: np.ndarray, method: str) -> np.ndarray:
    """What alpha and beta multiply in the gain at the distances d > 0 [n]: [n, 2]."""
    slope = d if method == "best-of-n" else np.log(d)
    return np.stack([d, -d * slope], axis=1)


def fit_gain(d: np.ndarray, gain: np.ndarray, method: str) -> np.ndarray:
    """Fit alpha and beta [2] to gains in gold reward at square roots of the KL above 0, of any shape."""
    return np.linalg.lstsq(columns(d.ravel(), method), gain.ravel(), rcond=None)[0]


def standardise(values: Any, pool: Pool) -> np.ndarray:
    """Standardise values by mean and standard deviation of the rewards of the base's samples."""
    rewards = np.concatenate(pool)
    return (np.asarray(values) - rewards.mean()) / max(rewards.std(), 1e-9)


def narrow(hidden: int) -> toy_tasks.Task:
    """The sentiment task with a tiny model of one layer of this width."""
    task = toy_tasks.load("sentiment")
    return replace(task, build=replace(task.build, layers=1, hidden=hidden))


def make_pairs(base: Base, max_pairs: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Make pairs of the base's reviews: for training, in random order, and about 700 held out."""
    policy = load_policy(base.path)

    def sample_pairs(rows: Sequence[Any], per_prompt: int, seed: int) -> list[Pair]:
        sampling = Sampling(MAX_TOKENS, num_generations=2 * per_prompt, seed=seed)
        preferences = make_preferences(policy, rows, gold, sampling, noise_temperature=0.5)
        return read_pairs(preferences, "the sampled pairs")

    prompts = base.task.train_prompts
    per_prompt = math.ceil(1.1 * max_pairs / len(prompts))  # some pairs are of one text
    pairs = sample_pairs(prompts, per_prompt, 2 * seed)
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order], sample_pairs(base.task.eval_prompts, 5, 2 * seed + 1)


def train_judge(hidden: int, pairs: list[Pair], seed: int) -> RewardModel:
    """A reward model on a warm-started backbone: three passes over the pairs, at least 40 updates."""
    judge = reward_backbone(load_policy(str(warm_started_base(narrow(hidden)))), seed=seed)
    judge.batch_size = 256
    steps = max(40, 3 * len(pairs) // 32)
    options = RewardModelArguments(
        max_steps=steps, batch_size=32, learning_rate=1e-3, eval_every=steps, seed=seed
    )
    fit_reward_model(judge, pairs, options)
    return judge


def best_of(base: Base, proxies: Pool, args: Args) -> np.ndarray:
    """KL, proxy and gold of best-of-n for n = 1, 2, 4 ..., [points, 3]; means over prompts."""
    points = []
    for k in range(int(math.log2(args.pool))):
        rows = []  # of a prompt
        for proxy, gold in zip(proxies, base.gold, strict=True):
            weights = best_of_n.choice_weights(proxy, 2**k)
            gains = standardise(proxy, proxies), standardise(gold, base.gold)
            rows.append([best_of_n.best_of_n_kl(proxy, 2**k), *(weights @ gain for gain in gains)])
        points.append(np.mean(rows, axis=0))
    return np.array(points)


def pursue(
    judge: RewardModel, base: Base, proxies: Pool, steps: int, seed: int, run: Path
) -> np.ndarray:
    """KL, proxy and gold of fresh samples along an RL run, [points, 3]; gold has weight 0."""

    def proxy(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return standardise(judge(prompts, completions), proxies).tolist()

    result = train(
        task=base.task, model=base.path, reward=(proxy, gold), reward_weights=(1.0, 0.0),
        estimator=Estimator.preset("rloo", beta=1e-3), max_steps=steps,
        learning_rate=3e-4, lr_scheduler_type="constant", eval_every=0, eval_generations=1,
        log_completions=0, stop_after_zero_spread=0, seed=seed, output_dir=str(run),
        overwrite=True, quiet=True,
    )  # fmt: skip
    if result.exit_code:  # a signal ended the run; it is meant for the whole program
        raise SystemExit(result.exit_code)
    metrics = pd.DataFrame(read_metrics(result.output_dir / "metrics.jsonl")[1:])
    points = metrics[["kl", "rewards/proxy/mean", "rewards/gold/mean"]].to_numpy(copy=True)
    points[:, 2] = standardise(points[:, 2], base.gold)
    whole = steps // STEPS_PER_POINT * STEPS_PER_POINT
    return points[:whole].reshape(-1, STEPS_PER_POINT, 3).mean(axis=1)


@dataclass
class Curve:
    """Square root of the KL and the gains of one reward model, by RL or best-of-n, [seeds, points]."""

    method: str
    d: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray


def mean_of(values: np.ndarray) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % interval; nan where there are too few."""
    if len(values) < 2:
        return float(values.sum()) if len(values) else math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(half)


def findings(curve: Curve) -> dict[str, Any]:
    """The turn, where the mean of the other seeds is highest; what follows it; and the fit."""
    seeds = range(len(curve.gold))
    other_seeds = [[s for s in seeds if s != seed] or [seed] for seed in seeds]
    turns = np.array([curve.gold[rows].mean(axis=0).argmax() for rows in other_seeds])
    best = curve.gold.argmax(axis=1)

    def change(values: np.ndarray, points: np.ndarray) -> np.ndarray:
        return values[:, -1] - values[seeds, points]

    fell = (change(curve.gold, best) < -MIN_FALL) & (change(curve.proxy, best) > 0)
    gold = mean_of(change(curve.gold, turns))
    proxy = mean_of(change(curve.proxy, turns))
    return {
        "d": mean_of(curve.d[seeds, best][fell]), "gold": gold, "proxy": proxy,
        "fit": fit_gain(curve.d, curve.gold, curve.method).tolist(),
        "fell": int(fell.sum()), "turned": sum(gold) < 0 < proxy[0] - proxy[1],
    }  # fmt: skip


def draw(curves: dict[Key, Curve], results: dict[Key, dict[str, Any]]) -> Figure:
    names = list(dict.fromkeys(name for name, _ in curves))
    figure = Figure(figsize=(3.1 * len(names) + 0.6, 6.6), dpi=100, layout="constrained")
    grid = figure.subplots(2, len(names), sharey="row", squeeze=False)
    for (name, method), curve in curves.items():
        width, pairs = name.split(":")
        result = results[name, method]
        fallen = f"{result['fell']} of {len(curve.gold)} fall"
        axes = grid[METHODS.index(method), names.index(name)]
        panel(axes, curve, result)
        title = f"{method}, width {width}, {pairs} pairs: {fallen}"
        axes.set_title(title, fontsize=9.5, loc="left")
    for axes in grid[:, 0]:
        axes.set_ylabel("gain on the base (its s.d.)")
    fallen = {m: sum(results[name, m]["fell"] for name in names) for m in METHODS}
    title = f"Gold falls while the proxy rises: under RL with {fallen['RL']} of "
    title += f"{len(names) * len(curve.gold)} reward models, "
    title += f"under best-of-n with {fallen['best-of-n']}"
    figure.suptitle(title, fontsize=13, fontweight="bold")
    handles = {}
    for axes in grid.flat:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def panel(axes: Axes, curve: Curve, result: dict[str, Any]) -> None:
    d = curve.d
    for values, colour, name in ((curve.proxy, ORANGE, "proxy"), (curve.gold, BLUE, "gold")):
        axes.plot(d.T, values.T, color=colour, linewidth=0.6, alpha=0.35)
        mean = values.mean(axis=0)
        axes.plot(d.mean(axis=0), mean, color=colour, linewidth=2.2, label=f"{name} (thin: a seed)")
    line = np.linspace(0.05, float(d.max()), 100)
    fit = columns(line, curve.method) @ result["fit"]
    axes.plot(line, fit, "k--", linewidth=1.2, label="fit to gold")
    if result["fell"]:
        label = "turn (mean of seeds that fall)"
        axes.axvline(result["d"][0], color=GREY, linewidth=1, linestyle=":", label=label)
    axes.axhline(0, color="#BBBBBB", linewidth=0.8)
    axes.set(xlabel="sqrt(KL to the base), sqrt(nats)", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)


def measure(args: Args, base: Base) -> dict[Key, Curve]:
    """Train all reward models and maximise each by RL and by best-of-n."""
    rows: dict[Key, list[np.ndarray]] = {}
    max_pairs = max(int(name.split(":")[1]) for name in args.configurations)
    for seed in range(args.seeds):
        pairs, held_out = make_pairs(base, max_pairs, seed)
        for name in args.configurations:
            width, count = map(int, name.split(":"))
            judge = train_judge(width, pairs[:count], seed)
            metrics = preference_metrics(
                score_pairs(judge, encode_pairs(judge, held_out)), held_out
            )
            proxies = best_of_n.pool_rewards(judge, base.rows, base.texts)
            run = args.output_dir / name.replace(":", "_") / f"seed_{seed}"
            along_run = pursue(judge, base, proxies, args.max_steps, seed, run)
            rows.setdefault((name, "RL"), []).append(along_run)
            rows.setdefault((name, "best-of-n"), []).append(best_of(base, proxies, args))
            accuracy = "accuracy {accuracy:.3f} of {noise_ceiling:.3f}".format(**metrics)
            print(f"seed {seed} {name:>8}: {accuracy}", flush=True)
    curves = {}
    for key, points in rows.items():
        kl, proxy, gold = np.moveaxis(points, 2, 0)
        d = np.sqrt(np.maximum(kl, 1e-4))  # an estimate of a KL near 0 can be negative
        curves[key] = Curve(key[1], d, proxy, gold)
    return curves


def main(args: Args) -> None:
    cells = args.seeds * len(args.configurations)
    guess = cells * (6 + 0.08 * args.max_steps) / 60
    print(f"{cells} reward models and RL runs: about {guess:.0f} min on one core")
    task = narrow(POLICY_WIDTH)
    path = str(warm_started_base(task))
    rows = task.eval_prompts[:: len(task.eval_prompts) // 8][:8]
    prompts = [row["prompt"] for row in rows]
    sampling = Sampling(MAX_TOKENS, num_generations=args.pool)
    texts = best_of_n.sample_pool(load_policy(path), prompts, sampling)
    base = Base(task, path, rows, texts, best_of_n.pool_rewards(gold, rows, texts))
    curves = measure(args, base)
    results = {key: findings(curve) for key, curve in curves.items()}
    print("\nwidth:pairs, by   d of turn      gold after    proxy after  fell  mean falls")
    for (name, method), row in results.items():
        numbers = " ".join("{:6.2f} ± {:.2f}".format(*row[key]) for key in ("d", "gold", "proxy"))
        print(f"{name:>8} {method:>9} {numbers} {row['fell']:6}  {row['turned']}")
    record = {" ".join(key): {"curves": asdict(c), **results[key]} for key, c in curves.items()}
    write_json(args.output_dir / "results.json", record)
    figure = args.output_dir / "overoptimisation.png"
    draw(curves, results).savefig(figure)
    print(f"figure: {figure}")


if __name__ == "__main__":
    main(tyro.cli(Args))
