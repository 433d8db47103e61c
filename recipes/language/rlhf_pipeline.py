"""RLHF in one command: warm start, preferences, a reward model, RL against it with a KL to the base.

    python recipes/language/rlhf_pipeline.py                        film reviews: favourable, grammatical
    python recipes/language/rlhf_pipeline.py --task target_length   as many letters as asked

The task's own reward is the gold reward: it labels the preferences, with noise, and it measures the outcome.
RL uses only the reward model (gold is recorded with weight 0). RL is compared with best-of-n: the reward
model chooses among n samples of the base, without training.

Look for: the gold reward at the end, above that of the base and of best-of-4, and its cost in KL. The KL of
the policy is the log ratio summed over fresh completions (k1). That of best-of-n comes from the shares of the
pool, with ties; the curves of the run are in runs/rlhf/policy/report.html. Errors are standard errors over
held-out prompts. The results are in recipes/README.md, section "Reward models".
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

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

SIZES = (1, 4, 16, 64)  # n of best-of-n
POOL = 128  # samples of the base for each held-out prompt, from which best-of-n chooses
HELD_OUT = 2**32  # added to the seed of the held-out preferences
NOISE = 0.3  # of the labels: P(first chosen) = sigmoid(difference of gold rewards / this)
RUNS = Path("runs/rlhf")
Rows = dict[str, dict[str, float]]
"""Means of held-out prompts by policy: `gold` and, where there is one, `kl` to the base, and their `..._stderr`."""


def prefer(
    task: toy_tasks.Task, base: str, pairs: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Sample pairs from the base, labelled by the gold reward, of training and of held-out prompts."""
    policy = load_policy(base)
    splits = {}
    for split, rows, count, start in (
        ("train", task.train_prompts, pairs, seed),
        ("test", task.eval_prompts, pairs // 4, HELD_OUT + seed),
    ):
        each = -(-count // len(rows))
        sampling = Sampling(task.max_completion_length, num_generations=2 * each, seed=start)
        chosen = rows[: -(-count // each)]
        splits[split] = make_preferences(
            policy, chosen, task.reward, sampling, noise_temperature=NOISE
        )
    return splits


def judge(splits: dict[str, list[dict[str, Any]]], base: str, seed: int) -> Any:
    """Train the reward model by two passes over the pairs: the base with a new head."""
    result = train_reward_model(
        data=splits, eval_split="test", eval_size=len(splits["test"]),
        max_steps=max(1, 2 * len(splits["train"]) // 64),
        model=load_policy(base), learning_rate=1e-3, seed=seed,
        output_dir=str(RUNS / "reward_model"), overwrite=True, quiet=True,
    )  # fmt: skip
    if result.exit_code:  # a signal ended it; it is meant for the whole program
        raise SystemExit(result.exit_code)
    return result


def reinforce(
    task: toy_tasks.Task, base: str, reward_model: Path, max_steps: int, seed: int
) -> Path:
    """RLOO on the reward model's reward less beta KL; returns the directory of the run."""

    def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return task.reward(prompts, completions, **columns)

    proxy = RewardModel(reward_model, batch_size=128)
    proxy.__name__ = "proxy"
    result = tokenrl.train(
        task=task, model=base, reward=(proxy, gold), reward_weights=(1.0, 0.0),
        estimator=tokenrl.Estimator.preset("rloo", beta=0.1), max_steps=max_steps,
        prompts_per_step=16, learning_rate=2e-4, lr_scheduler_type="constant", seed=seed,
        output_dir=str(RUNS / "policy"), overwrite=True, quiet=True,
    )  # fmt: skip
    if result.exit_code:
        raise SystemExit(result.exit_code)
    return result.output_dir


def measured(metrics: dict[str, float], gold: str, kl: str = "") -> dict[str, float]:
    """A row of the table: gold reward and KL by their names among metrics."""
    names = {"gold": gold, "gold_stderr": f"{gold}_stderr"}
    names |= {"kl": kl, "kl_stderr": f"{kl}_stderr"} if kl else {}
    return {column: metrics[name] for column, name in names.items()}


def sampled(name: str, model: str, base: str, task: toy_tasks.Task, seed: int) -> Rows:
    """Rows of the table for a policy: sampled, with its KL, and greedy."""
    metrics = evaluate_policy(
        load_policy(model), task.eval_prompts, Rewards(task.reward),
        Sampling(task.max_completion_length, num_generations=8, seed=seed),
        reference=load_policy(base),
    ).metrics  # fmt: skip
    return {
        f"{name}, sampled": measured(metrics, "reward", "kl"),
        f"{name}, greedy": measured(metrics, "reward_greedy"),
    }


def selected(reward_model: Path, base: str, task: toy_tasks.Task, seed: int) -> Rows:
    """Rows of the table for best-of-n: the reward model chooses, the gold reward measures the choice."""
    sampling = Sampling(task.max_completion_length, num_generations=POOL, seed=seed)
    judges = Rewards(RewardModel(reward_model, batch_size=256)), Rewards(task.reward)
    metrics = best_of_n.best_of_n_metrics(load_policy(base), task.eval_prompts, *judges, sampling)
    return {f"best of {n}": measured(metrics, f"best_of_n@{n}", f"best_of_n_kl@{n}") for n in SIZES}


def table(rows: Rows) -> str:
    lines = [f"{'':14}{'gold reward':>18}{'KL to the base':>18}"]
    for name, row in rows.items():
        gold = "{gold:.3f} ± {gold_stderr:.3f}".format(**row)
        kl = "{kl:.3f} ± {kl_stderr:.3f}".format(**row) if "kl" in row else ""
        lines.append(f"{name:14}{gold:>18}{kl:>18}".rstrip())
    return "\n".join(lines)


def main(
    task: str = "sentiment",
    pairs: int = 2000,
    max_steps: int = 120,
    eval_prompts: int = 64,
    seed: int = 0,
) -> None:
    """Run a small RLHF.

    Args:
        task: A toy task; its rule-based reward is the gold reward.
        pairs: Pairs of the base's completions to learn from; those that cannot be told apart are left out.
        max_steps: RL steps.
        eval_prompts: Held-out prompts of the final evaluation.
        seed: Seed of everything but the base.
    """
    gold = toy_tasks.load(task)
    every = max(1, len(gold.eval_prompts) // eval_prompts)
    gold = replace(gold, eval_prompts=gold.eval_prompts[::every][:eval_prompts])
    base = str(warm_started_base(gold))
    judged = judge(prefer(gold, base, pairs, seed), base, seed)
    reward_model = judged.output_dir / "model"
    run = reinforce(gold, base, reward_model, max_steps, seed)
    rows = sampled("base", base, base, gold, seed) | selected(reward_model, base, gold, seed)
    rows |= sampled("RL", str(run / "model"), base, gold, seed)
    print(table(rows))
    accuracy, most = (judged.eval_after[name] for name in ("accuracy", "noise_ceiling"))
    print(
        f"reward model: accuracy {accuracy:.3f} on held-out pairs; the gold reward reaches {most:.3f}"
    )


if __name__ == "__main__":
    tyro.cli(main)
