"""RLHF in one command: warm start, preferences, a reward model, RL against it with a KL to the base.

    python recipes/language/rlhf_pipeline.py                        film reviews: favourable, grammatical
    python recipes/language/rlhf_pipeline.py --task target_length   as many letters as asked

The task's own reward is the gold reward: it labels the preferences, with noise, and it measures the outcome.
RL uses only the reward model (gold is recorded with weight 0). RL is compared with best-of-n: the reward
model chooses among n samples of the base, without training.

Look for: the gold reward at the end, above that of the base and of best-of-4, and its cost in KL. The KL of
the policy is the log ratio summed over fresh completions (k1). That of best-of-n comes from the shares of the
pool, with ties; log n - (n-1)/n is an upper bound. Errors are standard errors over held-out prompts. The
results are in recipes/README.md, section "Reward models".
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure

import tokenrl
import toy_tasks
from tokenrl import RewardModel, load_policy, train_reward_model
from tokenrl.language import (
    Rewards,
    Sampling,
    best_of_n,
    evaluate_policy,
    make_preferences,
    warm_started_base,
)
from tokenrl.runs import read_metrics, smooth

BLUE, GREEN, GREY = "#0072B2", "#009E73", "#8A8A8A"
SIZES = (1, 4, 16, 64)  # n of best-of-n
HELD_OUT = 2**32  # added to the seed of the held-out preferences


@dataclass(frozen=True)
class Args:
    """A small RLHF."""

    task: str = "sentiment"
    """A toy task; its rule-based reward is the gold reward."""
    pairs: int = 2000
    """Pairs of the base's completions to learn from; those that cannot be told apart are left out."""
    noise: float = 0.3
    """Noise of the labels: P(first chosen) = sigmoid(difference of gold rewards / this)."""
    reward_epochs: int = 2
    """Passes of the reward model over the pairs."""
    beta: float = 0.1
    """Weight of the KL to the base, in units of the reward model's reward; k1 in the reward."""
    max_steps: int = 120
    """RL steps."""
    prompts_per_step: int = 16
    """Prompts per step, with 8 completions each."""
    learning_rate: float = 2e-4
    """Learning rate of RL, constant."""
    eval_prompts: int = 64
    """Held-out prompts of the final evaluation."""
    pool: int = 128
    """Samples of the base for each of these prompts, from which best-of-n chooses."""
    seed: int = 0
    """Seed of everything but the base."""
    output_dir: Path = Path("runs/rlhf")
    """Directory of the reward model, the RL run and the figure."""


class Row(NamedTuple):
    """A row of the table: gold reward and KL to the base with their standard errors, and the KL's bound."""

    gold: tuple[float, float]
    kl: tuple[float, float] | None = None
    bound: float | None = None


def prefer(args: Args, task: toy_tasks.Task, base: str) -> dict[str, list[dict[str, Any]]]:
    """Sample pairs from the base, labelled by the gold reward, of training and of held-out prompts."""
    policy = load_policy(base)
    splits = {}
    for split, rows, count, seed in (
        ("train", task.train_prompts, args.pairs, args.seed),
        ("test", task.eval_prompts, args.pairs // 4, HELD_OUT + args.seed),
    ):
        each = -(-count // len(rows))
        sampling = Sampling(task.max_completion_length, num_generations=2 * each, seed=seed)
        chosen = rows[: -(-count // each)]
        splits[split] = make_preferences(
            policy, chosen, task.reward, sampling, noise_temperature=args.noise
        )
    return splits


def judge(args: Args, splits: dict[str, list[dict[str, Any]]], base: str) -> Any:
    """Train the reward model: the base with a new head."""
    result = train_reward_model(
        data=splits, eval_split="test", eval_size=len(splits["test"]),
        max_steps=max(1, args.reward_epochs * len(splits["train"]) // 64),
        model=load_policy(base), learning_rate=1e-3, seed=args.seed,
        output_dir=str(args.output_dir / "reward_model"), overwrite=True, quiet=True,
    )  # fmt: skip
    if result.exit_code:  # a signal ended it; it is meant for the whole program
        raise SystemExit(result.exit_code)
    return result


def reinforce(args: Args, task: toy_tasks.Task, base: str, reward_model: Path) -> Path:
    """RLOO on the reward model's reward less beta KL; returns the directory of the run."""

    def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return task.reward(prompts, completions, **columns)

    proxy = RewardModel(reward_model, batch_size=128)
    proxy.__name__ = "proxy"
    result = tokenrl.train(
        task=task, model=base, reward=(proxy, gold), reward_weights=(1.0, 0.0),
        estimator=tokenrl.Estimator.preset("rloo", beta=args.beta), max_steps=args.max_steps,
        prompts_per_step=args.prompts_per_step, learning_rate=args.learning_rate,
        lr_scheduler_type="constant", seed=args.seed,
        output_dir=str(args.output_dir / "policy"), overwrite=True, quiet=True,
    )  # fmt: skip
    if result.exit_code:
        raise SystemExit(result.exit_code)
    return result.output_dir


def with_error(metrics: dict[str, float], name: str) -> tuple[float, float]:
    return metrics[name], metrics[f"{name}_stderr"]


def sampled(name: str, model: str, base: str, task: toy_tasks.Task, seed: int) -> dict[str, Row]:
    """Rows of the table for a policy: sampled, with its KL, and greedy."""
    metrics = evaluate_policy(
        load_policy(model), task.eval_prompts, Rewards(task.reward),
        Sampling(task.max_completion_length, num_generations=8, seed=seed),
        reference=load_policy(base),
    ).metrics  # fmt: skip
    return {
        f"{name}, sampled": Row(with_error(metrics, "reward"), with_error(metrics, "kl")),
        f"{name}, greedy": Row(with_error(metrics, "reward_greedy")),
    }


def selected(args: Args, reward_model: Path, base: str, task: toy_tasks.Task) -> dict[str, Row]:
    """Rows of the table for best-of-n: the reward model chooses, the gold reward measures the choice."""
    sampling = Sampling(task.max_completion_length, num_generations=args.pool, seed=args.seed)
    judges = Rewards(RewardModel(reward_model, batch_size=256)), Rewards(task.reward)
    metrics = best_of_n.best_of_n_metrics(load_policy(base), task.eval_prompts, *judges, sampling)
    rows = {}
    for n in SIZES:
        if n <= args.pool:
            gold, kl = (
                with_error(metrics, f"{name}@{n}") for name in ("best_of_n", "best_of_n_kl")
            )
            rows[f"best of {n}"] = Row(gold, kl, best_of_n.kl_bound(n))
    return rows


def table(rows: dict[str, Row]) -> str:
    plus = "{:.3f} ± {:.3f}".format
    lines = [f"{'':14}{'gold reward':>18}{'KL to the base':>18}{'bound':>8}"]
    for name, row in rows.items():
        kl = plus(*row.kl) if row.kl else ""
        bound = f"{row.bound:.3f}" if row.bound is not None else ""
        lines.append(f"{name:14}{plus(*row.gold):>18}{kl:>18}{bound:>8}".rstrip())
    return "\n".join(lines)


def verdict(rows: dict[str, Row]) -> str:
    """Compare the sampled policy with the others; within two standard errors it is level."""
    rl, words = rows["RL, sampled"].gold, []
    for name in ("base, sampled", "best of 4", "best of 16"):
        if name in rows:
            gap = rl[0] - rows[name].gold[0]
            error = np.hypot(rl[1], rows[name].gold[1])
            word = "level with" if abs(gap) <= 2 * error else "above" if gap > 0 else "BELOW"
            words.append(f"{word} {name.removesuffix(', sampled')}")
    return f"RL ends at gold {rl[0]:.2f}: " + ", ".join(words)


def draw(rows: dict[str, Row], metrics: list[dict[str, Any]], task: str) -> Figure:
    """Draw gold reward against the KL; the curves of the run are in policy/report.html."""
    steps = [row for row in metrics if "rewards/gold/mean" in row]
    kl, gold = (smooth([row[name] for row in steps], 5) for name in ("kl", "rewards/gold/mean"))
    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(np.sqrt(np.maximum(kl, 0)), gold, color=BLUE, alpha=0.5)
    for name, row in rows.items():
        if row.kl and name != "best of 1":  # which is the base
            colour = GREEN if row.bound is not None else BLUE if name.startswith("RL") else GREY
            at = np.sqrt(max(row.kl[0], 0)), row.gold[0]
            axes.errorbar(*at, yerr=2 * row.gold[1], color=colour, marker="o", capsize=3)
            look = {"ha": "right", "color": colour, "fontsize": 9, "textcoords": "offset points"}
            axes.annotate(name.removesuffix(", sampled"), at, (-7, 5), **look)
    axes.margins(0.14)
    axes.set(xlabel="sqrt(KL to the base), sqrt(nats)", ylabel="gold reward, held-out prompts")
    note = "line: RL in training; bars: 2 standard errors"
    axes.set_title(f"{task}: {verdict(rows)}\n{note}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EAEAEA", linewidth=0.8)
    return figure


def main(args: Args) -> None:
    task = toy_tasks.load(args.task)
    every = max(1, len(task.eval_prompts) // args.eval_prompts)
    task = replace(task, eval_prompts=task.eval_prompts[::every][: args.eval_prompts])
    base = str(warm_started_base(task))
    judged = judge(args, prefer(args, task, base), base)
    reward_model = judged.output_dir / "model"
    run = reinforce(args, task, base, reward_model)
    rows = sampled("base", base, base, task, args.seed) | selected(args, reward_model, base, task)
    rows |= sampled("RL", str(run / "model"), base, task, args.seed)
    print(table(rows))
    accuracy, most = (judged.eval_after[name] for name in ("accuracy", "noise_ceiling"))
    print(
        f"reward model: accuracy {accuracy:.3f} on held-out pairs; the gold reward reaches {most:.3f}"
    )
    print(verdict(rows))
    figure = args.output_dir / "rlhf_pipeline.png"
    draw(rows, read_metrics(run / "metrics.jsonl"), args.task).savefig(figure)
    print(f"figure: {figure}")


if __name__ == "__main__":
    main(tyro.cli(Args))
