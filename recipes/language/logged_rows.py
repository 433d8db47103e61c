"""What does a log teach? Area of the held-out reward against the share of logged rows, on two toy tasks.

    python recipes/language/logged_rows.py                 half an hour on two cores
    python recipes/language/logged_rows.py --tasks sort_digits --seeds 6 --max-steps 60

Two logs are made for each task: of the model that runs start from (`start`), and of one that RLOO has trained for as
many steps (`better`). Each has the completions of every prompt of one run, with rewards and log-probabilities. Then
`tokenrl compare` trains with none, a quarter, half and all rows from a log, in two ways: `rloo` with weights of
sequences, which is exact in this one pass, and `reinforce` without any, which ascends the likelihood of the rows,
weighted by their rewards. `recipes/pages/explain/off_policy.md` has the text.

The plan, written before any run: all arms at the task's own settings, 60 steps, six paired seeds, one log of each kind
for all of them. The score is the area under the held-out sampled reward, bars are standard errors over seeds. Each arm
is judged against `rloo` that samples all rows itself, 13 comparisons a task that share the error. Nothing is left out,
and no other setting is tried. Before it was written, two steps of two seeds were run, to see that the recipe works.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
from itertools import product
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import tokenrl
from tokenrl.language import Policy, Sampling, TransformersGenerator, load_task, warm_started_base

LOGS = {"start": "#0072B2", "better": "#D55E00"}
ARMS = {"rloo,importance=sequence": "-", "reinforce": "--"}
SHARES = (0.25, 0.5, 1.0)


def write_log(path: Path, policy: Policy, task: tokenrl.PromptTask, prompts: int) -> None:
    """Write eight sampled completions of each of the first prompts, with rewards and log-probabilities."""
    generator = TransformersGenerator(policy)
    sampling = Sampling(task.max_completion_length, num_generations=8)
    draws = torch.Generator().manual_seed(0)
    lines = []
    for row in [*task.train_prompts][:prompts]:
        uniforms = torch.rand(8, task.max_completion_length, generator=draws)
        rollout = generator.generate([policy.encode(row["prompt"])], sampling, uniforms)
        texts = policy.decode(rollout.completion_ids, rollout.mask)
        rewards = task.reward([row["prompt"]] * 8, texts)
        for ids, logprobs, mask, worth in zip(
            rollout.completion_ids, rollout.sampling_logprobs, rollout.mask, rewards, strict=True
        ):
            lines.append(
                {
                    "prompt": row["prompt"],
                    "completion_ids": ids[mask].tolist(),
                    "logprobs": logprobs[mask].tolist(),
                    "reward": worth,
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(
    tasks: tuple[str, ...] = ("sort_digits", "reverse_text"),
    seeds: int = 6,
    max_steps: int = 60,
    output_dir: Path = Path("runs/logged_rows"),
) -> None:
    """Make the logs that are not there yet, compare, print the rows of each task, and draw the areas."""
    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        folder, task = output_dir / name, load_task(name)
        options = {"task": name, "max_steps": max_steps, "overwrite": True, "quiet": True}
        prompts = max_steps * task.train["prompts_per_step"]
        for log in LOGS:
            path = folder / f"{log}.jsonl"
            if not path.exists():
                policy = tokenrl.load_policy(str(warm_started_base(name)))
                if log == "better":
                    policy = tokenrl.train(
                        estimator="rloo", seed=100, output_dir=folder / "better", **options
                    ).policy
                write_log(path, policy, task, prompts)
        arms = {
            (log, arm, share): f"{arm},rows={folder / log}.jsonl,rows_share={share}"
            for log, arm, share in product(LOGS, ARMS, SHARES)
        }
        own = {arm: arm.partition(",")[0] for arm in ARMS}
        result = tokenrl.compare(
            task=name, arms=[*own.values(), *arms.values()], reference="rloo", seeds=[seeds],
            eval_every=10, max_steps=max_steps, output_dir=folder / "compare",
        )  # fmt: skip
        runs = result.runs[result.runs["role"] == "comparison"]
        areas = runs.groupby("arm")["area"].agg(["mean", "sem"])
        for log, colour in LOGS.items():
            for arm, style in ARMS.items():
                points = areas.loc[[own[arm], *(arms[log, arm, share] for share in SHARES)]]
                print(f"{name:14} {log:8} {arm:26}", *(f"{x:7.3f}" for x in points["mean"]))
                label = f"{arm.partition(',')[0]}, {log} log"
                line = {"linestyle": style, "marker": ".", "color": colour, "label": label}
                axes.errorbar([0, *SHARES], points["mean"], points["sem"], **line)
        axes.set(title=name, xlabel="share of logged rows", ylabel="area of held-out reward")
    axes.legend(frameon=False)
    figure.savefig(output_dir / "logged_rows.png")
    print(f"figure: {output_dir / 'logged_rows.png'}")


if __name__ == "__main__":
    tyro.cli(main)
