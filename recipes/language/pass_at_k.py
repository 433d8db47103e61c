"""Two tasks on which the mean reward and another objective want different things, over paired seeds.

    python recipes/language/pass_at_k.py            about five minutes on one core
    python recipes/language/pass_at_k.py --task difficulty

`hidden`: the right answer is 0 for three rows of a prompt and 1 for two, and the prompt does not say which.
The mean reward is best if the answer is always 0, pass@8 if both are sampled. `difficulty`: a prompt accepts
six digits, two or one, so a new model solves some prompts often and others rarely. Every arm of a seed has
the same model, the same prompts and as many completions; the intervals are those of paired differences (95
percent).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import tempfile
from typing import Literal

import pandas as pd
import tyro
from scipy import stats

import tokenrl
from toy_tasks.models import TinyModel

ARMS = {"hidden": ("rloo", "max_at_k"), "difficulty": ("rloo", "maxrl")}
STEPS = {"hidden": 150, "difficulty": 20}


def right(completions: list[str], answers: list[str], **_) -> list[float]:
    """1 if the first character is one of the answers."""
    rows = zip(completions, answers, strict=True)
    return [float(text[:1] in set(accepted)) for text, accepted in rows]


right.binary = True


def task_of(name: str) -> tokenrl.PromptTask:
    """Make the task: rows with a prompt of one digit, and the digits that are right."""
    accepted = {"hidden": ("0", "0", "0", "1", "1"), "difficulty": ("012345", "67", "8")}[name]
    prompts = [f"{i % 10}{i // 10}>" for i in range(60)]
    if name == "hidden":
        prompts = [f"{i // 5}>" for i in range(50)]
    rows = [{"prompt": p, "answers": accepted[i % len(accepted)]} for i, p in enumerate(prompts)]
    return tokenrl.PromptTask(name, rows, rows, right, max_completion_length=2)


def numbers(name: str, estimator: str, seed: int, max_steps: int | None) -> dict[str, float]:
    """Train one run, and return what is reported of it."""
    task = task_of(name)
    with tempfile.TemporaryDirectory() as folder:
        run = tokenrl.train(
            task=task, model=TinyModel(tokens=tuple("0123456789>"))(seed), estimator=estimator, seed=seed,
            max_steps=max_steps or STEPS[name], prompts_per_step=16, num_generations=8,
            learning_rate=1e-3, eval_every=0, output_dir=folder, overwrite=True, quiet=True,
        )  # fmt: skip
        measured = tokenrl.evaluate(
            model=f"{run.output_dir}/model", task=task, num_generations=32, k=(1, 8)
        )
    if name == "hidden":
        return {f"pass@{k}": measured.metrics[f"pass@{k}"] for k in (1, 8)}
    rates = pd.DataFrame(task.eval_prompts).assign(rate=measured.by_prompt["reward"])
    by_answers = rates.groupby("answers")["rate"].mean()
    names = {"six digits are right": "012345", "two": "67", "one": "8"}
    return {label: by_answers[answers] for label, answers in names.items()}


def main(
    task: Literal["hidden", "difficulty"] = "hidden", seeds: int = 6, max_steps: int | None = None
) -> None:
    """Train both arms on each seed and print the means and the paired differences.

    Args:
        task: The task, and with it the two arms.
        seeds: Runs of each arm, at least two.
        max_steps: Steps of a run; by default 150 for hidden and 20 for difficulty.
    """
    a, b = (
        pd.DataFrame([numbers(task, arm, seed, max_steps) for seed in range(seeds)])
        for arm in ARMS[task]
    )
    gap = b - a
    half = stats.t.ppf(0.975, seeds - 1) * gap.sem()
    print("{:22}{:>10}{:>10}   difference".format("", *ARMS[task]))
    for name in gap:
        means = f"{a[name].mean():10.3f}{b[name].mean():10.3f}"
        print(f"{name:22}{means}   {gap[name].mean():+.3f} ± {half[name]:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
