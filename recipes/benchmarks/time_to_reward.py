"""Measures the time from the start of a program to a held-out reward, against TRL, on toy tasks.

Both start from the same model (the task's own, after its warm start) and train with the same estimator
(GRPO, without a KL), prompts per step, group size, completion length, AdamW, clipping of the norm, and
learning rate, which falls to 0 over `--steps`. The time counts from the start of the process: it includes
imports, loading, what is measured or compiled at the start, and all training steps. Only the evaluations are
left out, which are the same code for both: the greedy completions of held-out prompts, every few steps. A
run has reached the target when the mean of its last four evaluations has.
tokenrl has its default flags, to which `--tokenrl` adds others; TRL computes in float32, its fastest setting
for models so small (`--bf16` for the other).

    pip install -c constraints.txt -e '.[benchmarks]'
    python recipes/benchmarks/time_to_reward.py
    python recipes/benchmarks/time_to_reward.py --task sort_digits --target 0.9 --seeds 5

Each run is a process of its own; those of TRL and tokenrl take turns, seed by seed. The table has medians
over seeds, and the ratio of the seconds with its range.

Look for: steps that differ little between the two, since both learn the same, and a ratio of seconds that
comes from the time of a step and from the start. A run that does not reach the target is told.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from typing import Any

from one_trainer import train_with_trl
from step_against_trl import option, run

TASKS = {"sort_digits": 0.95, "reverse_text": 0.85}
"""Tasks, and the held-out reward of greedy completions that is to be reached."""
WINDOW = 4
"""Evaluations whose mean must reach it, since single ones are noisy."""
HEADING = (
    f"{'task':13} {'held-out reward':>17} {'TRL s':>7} {'steps':>6} {'tokenrl s':>10} {'steps':>6} "
    f"{'ratio (min to max)':>21}"
)


class Watch:
    """The reward function of both trainers: it evaluates every few steps, and ends the process at the target.

    `history` has the step, the seconds and the held-out reward of each evaluation.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        if job["who"] == "tokenrl":
            import tokenrl  # noqa: F401  # before torch, as the command does: it sets a variable of OpenMP
        from transformers import AutoModelForCausalLM  # noqa: F401  # both need it: its import counts

        began = time.time()
        import tokenrl.language as language  # torch is there already: for TRL no variable is set

        self.__name__ = "reward"
        self.job, self.language = job, language
        self.task = language.load_task(job["task"])
        self.rewards = language.Rewards(self.task.reward)
        self.policy: Any = None
        self.steps, self.apart = 0, time.time() - began
        self.history: list[tuple[int, float, float]] = []

    @property
    def seconds(self) -> float:
        """Seconds since the process was started, without those of evaluations and of this class."""
        return time.time() - self.job["started"] - self.apart

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        if len(prompts) == self.job["prompts"] * self.job["group"]:
            if self.steps % self.job["every"] == 0:
                self.evaluate()
            self.steps += 1
        rewards: list[float] = self.task.reward(prompts=prompts, completions=completions, **columns)
        return rewards

    def evaluate(self) -> None:
        seconds, began = self.seconds, time.time()
        sampling = self.language.Sampling(self.task.max_completion_length, 0)
        rows = self.task.eval_prompts[: self.job["held_out"]]
        metrics = self.language.evaluate_policy(self.policy, rows, self.rewards, sampling).metrics
        self.history.append((self.steps, seconds, metrics["reward_greedy"]))
        if level(self.history) >= self.job["target"]:
            self.end()
        self.apart += time.time() - began

    def end(self) -> None:
        """Print what was seen, and leave both trainers without what they do at their end."""
        print(json.dumps({"history": self.history}), flush=True)
        os._exit(0)


def level(history: list[tuple[int, float, float]]) -> float:
    """The mean reward of the last evaluations; minus infinity before there are enough."""
    rewards = [reward for _, _, reward in history[-WINDOW:]]
    return statistics.fmean(rewards) if len(rewards) == WINDOW else -math.inf


def train_tokenrl(watch: Watch, folder: str) -> None:
    import tokenrl

    job = watch.job
    watch.policy = tokenrl.load_policy(job["model"])
    tokenrl.train(
        model=watch.policy,
        task=job["task"],
        reward=watch,
        estimator="grpo",
        max_steps=job["steps"],
        prompts_per_step=job["prompts"],
        num_generations=job["group"],
        max_completion_length=watch.task.max_completion_length,
        learning_rate=job["rate"],
        lr_scheduler_type="linear",
        seed=job["seed"],
        output_dir=f"{folder}/run",
        **{
            "eval_every": 0,
            "eval_size": 2,
            "eval_generations": 0,
            "log_completions": 0,
            "quiet": True,
        }
        | job["options"],
    )


def train_trl(watch: Watch, folder: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = watch.job
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    began = time.time()
    watch.policy = watch.language.wrap(model, tokenizer)  # for the evaluations
    watch.apart += time.time() - began
    train_with_trl(
        model,
        tokenizer,
        list(watch.task.train_prompts),
        watch,
        output_dir=folder,
        max_steps=job["steps"],
        per_device_train_batch_size=job["prompts"] * job["group"],
        num_generations=job["group"],
        max_completion_length=watch.task.max_completion_length,
        learning_rate=job["rate"],
        lr_scheduler_type="linear",
        seed=job["seed"],
        bf16=job["bf16"],
    )


def race(job: dict[str, Any]) -> list[tuple[int, float, float]] | None:
    """Train in a new process, and return its history; None if it failed, which is printed on stderr."""
    result = run(job | {"started": time.time()}, __file__, "--child")
    if result is None:
        return None
    history: list[tuple[int, float, float]] = result["history"]
    step, seconds, _ = history[-1]
    words = f"{job['who']}, {job['task']}, seed {job['seed']}: {history[0][2]:.3f} at first, "
    print(
        f"  {words}{level(history):.3f} after {step} steps, {seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return history


def compare(name: str, args: argparse.Namespace) -> str:
    """Train with both in turn on every seed, and return a line of the table."""
    import torch  # noqa: F401  # before tokenrl, which then sets no variable that both would inherit

    import tokenrl.language as language

    task = language.load_task(name)
    target = TASKS[name] if args.target is None else args.target
    job = vars(args) | {
        "task": name,
        "model": str(language.warm_started_base(task)),
        "target": target,
    }
    job |= {"prompts": 16, "group": 8, "rate": args.learning_rate, "options": dict(args.tokenrl)}
    races = [
        {who: race(job | {"who": who, "seed": seed}) for who in ("trl", "tokenrl")}
        for seed in range(args.seeds)
    ]
    return table_row(name, target, races)


def table_row(name: str, target: float, races: list[dict[str, Any]]) -> str:
    """A line of the table; only of seeds with which both reached the target."""
    done = [
        histories
        for histories in races
        if all(history and level(history) >= target for history in histories.values())
    ]
    if not done:
        return f"{name:13} {target:>17.2f}  reached by both with no seed"
    last = {who: [histories[who][-1] for histories in done] for who in ("trl", "tokenrl")}
    ratios = [histories["trl"][-1][1] / histories["tokenrl"][-1][1] for histories in done]
    steps, seconds = (
        {who: statistics.median(x[k] for x in last[who]) for who in last} for k in (0, 1)
    )
    start = statistics.median(histories["tokenrl"][0][2] for histories in done)
    rewards = f"{start:.3f} to {target:.2f}"
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    missed = ""
    if len(done) < len(races):
        missed = f"  reached by both with {len(done)} of {len(races)} seeds"
    return (
        f"{name:13} {rewards:>17} {seconds['trl']:7.1f} {steps['trl']:6.0f} {seconds['tokenrl']:10.1f} "
        f"{steps['tokenrl']:6.0f} {ratio:>21}{missed}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--target", type=float, help="held-out reward to be reached, instead of the task's own"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="most steps of a run")
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument(
        "--held-out", type=int, default=128, help="held-out prompts of an evaluation"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 for TRL")
    parser.add_argument("--tokenrl", nargs="+", type=option, default=[], metavar="KEY=VALUE")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        watch, train = (
            Watch(args.child),
            {"trl": train_trl, "tokenrl": train_tokenrl}[args.child["who"]],
        )
        with tempfile.TemporaryDirectory() as folder:
            train(watch, folder)
        watch.end()
    print(HEADING, flush=True)
    for name in args.task:
        print(compare(name, args), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
