"""What training a reward model shows at its start, and what it leaves at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenrl.configuration import read_config
from tokenrl.language.policy.prompts import asked
from tokenrl.language.policy.saving import Card
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.preferences.backbone import save_reward_model
from tokenrl.language.preferences.data import RewardData
from tokenrl.language.preferences.sampled import write_preferences
from tokenrl.language.rewards.model import RewardModel
from tokenrl.runs.metrics import write_completions
from tokenrl.runs.reader import Outcome
from tokenrl.runs.session import Session


@dataclass(frozen=True)
class RewardModelResult(Outcome):
    """The result of training a reward model; see `Outcome` for the other fields.

    Attributes:
        eval_before: metrics on the held-out pairs before training; see `preference_metrics`.
        reward_model: the trained model, which is itself a reward function; saved in `model/` of the run
            directory.
    """

    reward_model: RewardModel = field(repr=False)


def facts(args: RewardModelArguments, data: RewardData, reward_model: RewardModel) -> dict[str, Any]:
    """Return the lines of the header that is printed when the run starts."""
    model = reward_model.model
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "model": f"{reward_model.__name__} ({size:,} trainable parameters, {model.device})",
        "data": f"{len(data.train):,} training pairs, {len(data.held_out):,} held out",
        "loss": f"Bradley-Terry, margin {args.margin:g}, centring {args.center_rewards_coefficient:g}, label "
        f"smoothing {args.label_smoothing:g}",
        "step": f"{args.max_steps} of {args.batch_size} pairs, learning rate {args.learning_rate:g}, seed "
        f"{args.seed}",
        **asked(reward_model.form, args.model if args.policy is None else args.policy),
        "run": args.output_dir,
    }


def finish(
    session: Session, data: RewardData, ended: RewardModelResult, rewards: np.ndarray, base: str | None
) -> None:
    """Save the model and the pairs, write summary and report, and show how the run ended.

    Args:
        session: the session of the run.
        data: the pairs.
        ended: the result.
        rewards: rewards of the chosen and rejected completions of the held-out pairs [N, 2].
        base: hub name or directory of the backbone; None if it came from neither.
    """
    directory = session.directory
    assert directory is not None  # a reward model trains in one process
    for name in ("preferences.jsonl", "preferences_eval.jsonl"):
        (directory.path / name).unlink(missing_ok=True)  # left by a run that this one replaces
        if name in data.rows:
            write_preferences(directory.path / name, data.rows[name])
    order = np.argsort(rewards[:, 0] - rewards[:, 1], kind="stable")  # the worst mistakes first
    rows = [
        {name: getattr(data.held_out[i], name) for name in ("prompt", "chosen", "rejected")}
        | {"reward_chosen": float(rewards[i, 0]), "reward_rejected": float(rewards[i, 1])}
        for i in order
    ]
    for earlier in directory.completions.glob("step_*.parquet"):  # of a run that this one continues
        earlier.unlink()
    write_completions(directory.completions, ended.steps, rows)
    settings, numbers = read_config(directory.path), ended.eval_after
    facts: dict[str, Any] = {f"{name} on held-out pairs": value for name, value in numbers.items()}
    facts |= asked(ended.reward_model.form)
    card = Card(settings["title"], facts, session.origin.in_words(), base).text("reward model")
    session.finish(ended, lambda path: save_reward_model(ended.reward_model, path, card=card))
    session.console.note(f"Train a policy on it: tokenrl train --reward {directory.model}")
