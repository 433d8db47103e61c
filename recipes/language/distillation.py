"""A reward, a teacher, or both: trains students of half a million weights over seeds, and compares them.

    python recipes/language/distillation.py --task sort_digits
    python recipes/language/distillation.py --task sort_digits --own
    python recipes/language/distillation.py --task four_digits --own --model MODEL --max-steps 20 --seeds 5

First a teacher of 2 million weights learns the task by RLOO. Then each arm starts from the task's base model and
samples the same number of completions: RLOO on the reward, three forms of on-policy distillation without a
reward, and RLOO with the KL to the teacher. Runs that have ended are
read, not made again.

With `--own` the student is its own teacher, which reads the right answer before the prompt. The model that both
begin with has learnt from demonstrations to copy such an answer, and to guess without one, mostly wrongly. The task
`four_digits` takes a pretrained model as it is, a directory or a hub name: two examples in the prompt say what to do.

Look for: whether a teacher is better than a reward that says no more than right or wrong, and how much of that is
left after equal seconds. The runs of a seed are made one after another, and the second comparison takes the cost
of an arm from the ratio of its median step to that of the first arm, in the median of the seeds.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

import tokenrl
import toy_tasks
from tokenrl.lab import judge_scores
from tokenrl.language import PromptTask
from tokenrl.runs import read_run

ARMS = {
    "rloo": "#999999",
    "opd": "#E69F00",
    "opd_full": "#56B4E9",
    "opd_full_path": "#0072B2",
    "rloo_opd": "#D55E00",
}
"""The presets that are compared, and their colours."""
RUNS = Path("runs/distillation")
Runs = dict[tuple[str, int], Any]  # by arm and seed


def sort_digits(prompt: str) -> str:
    """Return what the teacher of the task reads, the right answer before the prompt; `reverse_text` alike."""
    return "".join(sorted(prompt[:-1])) + ">" + prompt


def reverse_text(prompt: str) -> str:
    return prompt[-2::-1] + ">" + prompt


def in_order(prompt: str) -> list[str]:
    """Return the four digits of the last line of a prompt of `four_digits` in rising order."""
    return sorted(prompt.splitlines()[-1].split()[:4])


def four_digits(prompt: str) -> str:
    """Return the prompt of `four_digits` with its question answered twice after the two examples."""
    *examples, question = prompt.splitlines()
    answered = f"{question} {' '.join(in_order(prompt))}"
    return "\n".join([*examples, answered, answered, question])


def four_digits_task() -> PromptTask:
    """Return the task of sorting four digits, `7 5 9 3 ->`, rewarded for each digit in its place."""
    rows = []
    for number in random.Random(0).sample(range(10_000), 576):
        question = " ".join(f"{number:04}")
        rows.append({"prompt": f"3 1 8 2 -> 1 2 3 8\n9 4 6 0 -> 0 4 6 9\n{question} ->"})

    def in_place(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        rewards = []
        for prompt, completion in zip(prompts, completions, strict=True):
            rewards.append(sum(map(str.__eq__, in_order(prompt), completion.split())) / 4)
        return rewards

    in_place.range = (0.0, 1.0)  # type: ignore[attr-defined]
    return PromptTask("four_digits", rows[:512], rows[512:], in_place, max_completion_length=9)


CONTEXTS = {"sort_digits": sort_digits, "reverse_text": reverse_text, "four_digits": four_digits}
"""What a student reads as its own teacher, by task."""


def train(name: str, **settings: Any) -> Path:
    """Make a run, or continue it, and return its directory."""
    directory = RUNS / name
    if not (directory / "summary.json").exists():
        settings |= {"threads": 1, "resume": "auto", "quiet": True}
        if tokenrl.train(output_dir=str(directory), **settings).exit_code:
            raise SystemExit(f"{directory} was stopped; the same command goes on.")
    return directory


def make_teacher(task: str, steps: int) -> Path:
    """Return the directory of a teacher: a model of twice the width, warm-started, then trained by RLOO."""
    start = RUNS / f"{task}_start"
    if not start.exists():
        model, tokenizer = replace(toy_tasks.load(task).build, hidden=256)(seed=0)
        model.save_pretrained(start)
        tokenizer.save_pretrained(start)
    return train(f"{task}_teacher", task=task, model=str(start), warm_start=True, max_steps=steps)


def make_copyist(task: str, steps: int) -> Path:
    """Return the model of a run that learns to copy an answer before a prompt, and else to guess."""
    folder, data = RUNS / f"{task}_copyist", RUNS / f"{task}.jsonl"
    if not (folder / "summary.json").exists():
        rows = []
        for row in toy_tasks.load(task).demonstrations:
            hinted = CONTEXTS[task](row["prompt"])
            rows.append({"prompt": row["prompt"], "completion": row["completion"]})
            rows.append({"prompt": hinted, "completion": hinted.partition(">")[0]})
        RUNS.mkdir(parents=True, exist_ok=True)
        data.write_text("\n".join(map(json.dumps, rows)))
        for part in toy_tasks.load(task).build(seed=0):
            part.save_pretrained(RUNS / f"{task}_new")
        options = {"max_steps": steps, "threads": 1, "quiet": True}
        tokenrl.sft(task=str(data), model=str(RUNS / f"{task}_new"), output_dir=folder, **options)
    return folder / "model"


def own_settings(
    task: str, model: str | None, copyist_steps: int, max_steps: int
) -> dict[str, Any]:
    """Return what students need that are their own teachers: the model, and for a pretrained one its sizes."""
    if not model:
        return {"model": str(make_copyist(task, copyist_steps))}
    return {
        "model": model, "task": f"{os.path.relpath(__file__)}:four_digits_task", "stop": ("\n",),
        "prompts_per_step": 4, "num_generations": 8, "eval_generations": 2,
        "eval_every": max_steps // 4, "save_every": 0, "chat": False,
    }  # fmt: skip


def after_equal_seconds(
    runs: Runs, curves: dict[tuple[str, int], Any]
) -> list[tuple[str, int, float]]:
    """Return arm, seed and score of each run up to the seconds that the cheapest arm takes."""
    seconds = {
        key: median(row["step_seconds"] for row in run.timings if "step_seconds" in row)
        for key, run in runs.items()
    }
    first, _ = next(iter(runs))
    by_seed = pd.Series(seconds).unstack(0)
    costs = by_seed.div(by_seed[first], axis="index").median()
    for arm in dict.fromkeys(arm for arm, _ in runs):
        print(f"{arm:14} a step takes {costs[arm]:.2f} of {first}'s")
    rows = []
    for (arm, seed), (steps, rewards) in curves.items():
        steps = np.array(steps)
        curve = np.interp(steps[1:] * costs.min(), steps * costs[arm], rewards)
        rows.append((arm, seed, curve.mean()))
    return rows


def main(
    task: Literal["sort_digits", "calculator", "reverse_text", "four_digits"] = "sort_digits",
    model: str | None = None,
    arms: tuple[str, ...] = tuple(ARMS),
    seeds: int = 6,
    max_steps: int = 100,
    teacher_steps: int = 450,
    own: bool = False,
) -> None:
    """Make the runs, print mean scores with verdicts against the first arm, and draw the curves.

    Args:
        task: The task of the teacher and of the students.
        model: With `four_digits`, the pretrained model.
        arms: The presets; those without opd in their name have no teacher.
        seeds: Students of each arm.
        max_steps: Updates of a student.
        teacher_steps: Updates of the teacher.
        own: Let the students be their own teachers, of any task but calculator.
    """
    if (task == "four_digits") != bool(model) or (model and not own):
        raise SystemExit("--task four_digits and --model need each other, and --own.")
    name = f"{task}_own" if own else task
    shared = {"task": task, "max_steps": max_steps, "eval_every": max_steps // 10}
    if own:
        if task not in CONTEXTS:
            raise SystemExit(f"--own was given with --task {task}; it takes {', '.join(CONTEXTS)}.")
        shared |= own_settings(task, model, teacher_steps, max_steps)
        context = f"{os.path.relpath(__file__)}:{task}"
        teacher = {"teacher": "self", "teacher_context": context}
    else:
        teacher = {"teacher": str(make_teacher(task, teacher_steps))}
    runs = {}
    for seed in range(seeds):
        for arm in arms:
            settings = shared | (teacher if "opd" in arm else {})
            settings |= {"reward": "none"} if arm.startswith("opd") else {}
            folder = train(f"{name}_{arm}_{seed}", estimator=arm, seed=seed, **settings)
            runs[arm, seed] = read_run(folder)
    curves = {key: run.series("eval_reward") for key, run in runs.items()}
    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    for arm in arms:
        steps, rewards = np.transpose([curves[arm, seed] for seed in range(seeds)], (1, 2, 0))
        axes.plot(steps, rewards, color=ARMS[arm], alpha=0.2, linewidth=1)
        axes.plot(steps[:, 0], rewards.mean(1), color=ARMS[arm], label=arm)
        print(f"{arm:14} reward at the end {rewards[-1].mean():.3f}")
    axes.set(xlabel="updates", ylabel="reward on held-out prompts", title=name)
    axes.legend(frameon=False)
    figure.savefig(RUNS / f"{name}.png", dpi=150)
    rows = [(*key, fmean(rewards[1:])) for key, (_, rewards) in curves.items()]
    for title, scores in (("completions", rows), ("seconds", after_equal_seconds(runs, curves))):
        print(f"\nAfter equal {title}:")
        (family,) = judge_scores(scores, margin=0.02).families
        for of_arm in family.arms:
            print(f"{of_arm.arm:14} area {of_arm.mean:.4f}")
        print(family.headline(), *family.sentences(), sep="\n")


if __name__ == "__main__":
    tyro.cli(main)
