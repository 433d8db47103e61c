"""What the training of a reward model leaves behind: its run directory, its report, its result."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from tokenrl.errors import Refused, Stopped
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.preferences.backbone import save_reward_model
from tokenrl.language.preferences.data import RewardData
from tokenrl.language.preferences.evaluation import Bin, draw_calibration
from tokenrl.language.preferences.sampled import write_preferences
from tokenrl.language.rewards.model import RewardModel
from tokenrl.runs.checkpoint import replace_directory
from tokenrl.runs.console import Console
from tokenrl.runs.directory import RunDirectory, read_config
from tokenrl.runs.metrics import read_completions, read_metrics, write_completions
from tokenrl.runs.report import write_report

PLOT = "calibration.png"


@dataclass(frozen=True)
class RewardModelResult:
    """What the training of a reward model came to.

    Attributes:
        output_dir: the run directory; its `model` folder is what `--reward` takes.
        exit_reason: `finished`, `check`, `SIGTERM` or `SIGINT`.
        exit_code: 0, or 128 plus the signal's number.
        steps: updates made.
        eval_before: `accuracy` and more on held-out pairs, see `preference_metrics`, before training.
        eval_after: the same after it.
        calibration: the calibration curve on held-out pairs, after training.
        wall_seconds: from the first evaluation to the last.
        reward_model: the trained model, itself a reward function.
    """

    output_dir: Path
    exit_reason: str
    exit_code: int
    steps: int
    eval_before: dict[str, float]
    eval_after: dict[str, float]
    calibration: list[Bin]
    wall_seconds: float
    reward_model: RewardModel = field(repr=False)


def facts(args: RewardModelArguments, data: RewardData, reward_model: RewardModel) -> dict[str, Any]:
    """What the header says of a run."""
    model = reward_model.model
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "model": f"{reward_model.__name__} ({size:,} trainable parameters, {model.device})",
        "data": f"{len(data.train):,} training pairs, {len(data.held_out):,} held out",
        "loss": f"Bradley-Terry, margin {args.margin:g}, centring {args.center_rewards_coefficient:g}, label "
        f"smoothing {args.label_smoothing:g}",
        "step": f"{args.max_steps} of {args.batch_size} pairs, learning rate {args.learning_rate:g}, seed "
        f"{args.seed}",
        "run": args.output_dir,
    }


def config(args: RewardModelArguments, data: RewardData, reward_model: RewardModel) -> dict[str, Any]:
    """config.json: the resolved arguments, and what the report needs."""
    values = {f.name: getattr(args, f.name) for f in fields(args)}
    for name, shown in (("data", data.name), ("model", reward_model.__name__), ("policy", "in memory")):
        if values[name] is not None and not isinstance(values[name], str):
            values[name] = shown
    if values["task"] is not None and not isinstance(values["task"], str):
        values["task"] = data.task.name
    command = ["tokenrl", *sys.argv[1:]] if Path(sys.argv[0]).name == "tokenrl" else _command(values)
    title = f"Reward model, {data.name}, seed {args.seed}"
    pairs = {"train": len(data.train), "held_out": len(data.held_out)}
    return {**values, "title": title, "pairs": pairs, "command": shlex.join(command)}


def _command(values: dict[str, Any]) -> list[str]:
    """The command line of a call from Python; what is no default is named."""
    words = ["tokenrl", "reward-model"]
    for one in fields(RewardModelArguments):
        value = values[one.name]
        if value == one.default or isinstance(value, bool):
            continue
        several = [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
        words += ["--" + one.name.replace("_", "-"), *several]
    return words


def finish(
    directory: RunDirectory,
    data: RewardData,
    result: RewardModelResult,
    rewards: np.ndarray,
    console: Console,
) -> None:
    """Save the model and the pairs, write summary, plot and report, and show the end.

    Args:
        directory: the run directory.
        data: the pairs.
        result: what the run came to.
        rewards: [N, 2], of chosen and rejected of the held-out pairs.
        console: where the end is shown.
    """
    for name in ("preferences.jsonl", "preferences_eval.jsonl"):
        (directory.path / name).unlink(missing_ok=True)  # those of a run that this one replaces
        if name in data.rows:
            write_preferences(directory.path / name, data.rows[name])
    order = np.argsort(rewards[:, 0] - rewards[:, 1], kind="stable")  # the worst mistakes first
    rows = [
        {
            "prompt": data.held_out[i].prompt,
            "chosen": data.held_out[i].chosen,
            "rejected": data.held_out[i].rejected,
            "reward_chosen": float(rewards[i, 0]),
            "reward_rejected": float(rewards[i, 1]),
        }
        for i in order
    ]
    write_completions(directory.completions, result.steps, rows)
    card = _card(read_config(directory.path), result)
    replace_directory(directory.model, lambda path: save_reward_model(result.reward_model, path, card=card))
    summary = _summary(result)
    directory.write_summary(summary)
    report_reward_model(directory.path)
    console.finish(summary)
    console.note(
        f"model   {directory.model}\ncurve   {directory.path / PLOT}\nreport  {directory.report}\n"
        f"Train a policy on it: tokenrl train --reward {directory.model}"
    )


def _summary(result: RewardModelResult) -> dict[str, Any]:
    names = ("exit_reason", "steps", "wall_seconds", "eval_before", "eval_after")
    curve = [asdict(one) for one in result.calibration]
    return {name: getattr(result, name) for name in names} | {"calibration": curve}


def write_failure(directory: RunDirectory, error: Stopped, before: dict[str, float]) -> None:
    """Record a run that could not go on."""
    directory.write_summary(
        {"exit_reason": "failed", "eval_before": before, "eval_after": None, "error": str(error)}
    )


def report_reward_model(run: str | Path) -> Path:
    """Draw the calibration plot and write the report of a finished run from what lies in its directory.

    Raises:
        Refused: the directory holds no finished run.
    """
    run = Path(run)
    if not (run / "summary.json").is_file():
        raise Refused(f"{run} holds no summary.json; give the output directory of a finished run.")
    settings, metrics = read_config(run), read_metrics(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    if not summary.get("eval_after"):
        raise Refused(f"The run in {run} ended early ({summary.get('error', '')}); there is nothing to draw.")
    curve, title = [Bin(**one) for one in summary["calibration"]], str(settings.get("title", run.name))
    draw_calibration(run / PLOT, metrics, curve, summary["eval_after"], title=title)
    files = sorted((run / "completions").glob("step_*.parquet"))
    return write_report(
        run / "report.html",
        config=settings,
        metrics=metrics,
        summary=summary,
        completions={int(file.stem[5:]): read_completions(file) for file in files},
        plot_path=run / PLOT,
        title=title,
    )


def _card(settings: dict[str, Any], result: RewardModelResult) -> str:
    """README.md of the model."""
    numbers = [f"| {name} | {value:.4g} |" for name, value in result.eval_after.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-classification",
            "tags: [reward-model, tokenrl]",
            "---",
            f"# {settings['title']}",
            "",
            "A reward model: one number for prompt + completion, trained on preferences (Bradley-Terry).",
            "",
            "```python",
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "model = AutoModelForSequenceClassification.from_pretrained(DIRECTORY)",
            "tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)",
            "```",
            "",
            "| on held-out pairs | |",
            "|---|---|",
            *numbers,
            "",
            "Made by",
            "",
            "```",
            settings["command"],
            "```",
            "",
        ]
    )
