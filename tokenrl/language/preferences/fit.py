"""Training a reward model on preferences: Bradley-Terry on pairs, one loop, one run directory.

Bradley & Terry 1952; Stiennon et al. 2020; Ouyang et al. 2022, equation 1. One process and one device; left
out are adapters, mixed precision and accumulation (`batch_size` is what one forward pass takes).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tokenrl.errors import Refused, Stopped
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.preferences.data import RewardData, load_reward_data, make_backbone
from tokenrl.language.preferences.evaluation import (
    Encoded,
    calibration,
    encode_pairs,
    preference_metrics,
    score_pairs,
)
from tokenrl.language.preferences.pairs import Pair
from tokenrl.language.preferences.report import RewardModelResult, config, facts, finish, write_failure
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.training.setup import arguments
from tokenrl.runs.console import Console
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.metrics import MetricsLog
from tokenrl.runs.signals import GracefulStop

LOSS_NOTE = "The loss is the negative log-likelihood of the choices, nats a pair; 0.693 is a coin's."


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | float = 0.0,
    center_rewards_coefficient: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean negative log-likelihood of the choices, P(chosen) = sigmoid(d) with d = r_c - r_r - margin.

        mean[-(1 - e) log sigmoid(d) - e log sigmoid(-d)] + coefficient mean[(r_c + r_r)^2]

    Only differences of rewards matter to the first term; the second (Eisenstein et al. 2023) keeps their
    level near 0. The margin is Llama 2's (Touvron et al. 2023, equation 2).

    Args:
        chosen_rewards: [B].
        rejected_rewards: [B].
        margin: [B] or a number.
        center_rewards_coefficient: weight of the second term.
        label_smoothing: e, the assumed share of flipped labels.

    Returns:
        A scalar.
    """
    difference = chosen_rewards - rejected_rewards - margin  # [B]
    likelihood = (1 - label_smoothing) * logsigmoid(difference) + label_smoothing * logsigmoid(-difference)
    return (
        -likelihood.mean() + center_rewards_coefficient * (chosen_rewards + rejected_rewards).square().mean()
    )


def fit_reward_model(
    reward_model: RewardModel,
    pairs: Sequence[Pair],
    args: RewardModelArguments,
    on_step: Callable[[int, dict[str, float]], bool],
) -> int:
    """Minimise the Bradley-Terry loss by AdamW, in place, the learning rate falling linearly to 0.

    Pairs are drawn without replacement, an epoch after the other. Dropout is off.

    Args:
        reward_model: the model to train.
        pairs: what it learns from.
        args: with `max_steps` and `learning_rate` given.
        on_step: called after each update with its number and metrics; true ends the training.

    Returns:
        Updates made.

    Raises:
        Stopped: the loss became NaN or infinite.
    """
    encoded = encode_pairs(reward_model, pairs)
    margins = [args.margin if pair.margin is None else pair.margin for pair in pairs]
    parameters = [p for p in reward_model.model.parameters() if p.requires_grad]
    rate, steps = args.learning_rate or 0.0, args.max_steps or 0
    fused = reward_model.model.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=args.weight_decay, fused=fused)
    generator = torch.Generator().manual_seed(args.seed)
    order: list[int] = []
    tokens = 0
    for step in range(1, steps + 1):
        while len(order) < args.batch_size:
            order += torch.randperm(len(pairs), generator=generator).tolist()
        part, order = order[: args.batch_size], order[args.batch_size :]
        texts = [encoded[i][0] for i in part] + [encoded[i][1] for i in part]
        tokens += sum(map(len, texts))
        chosen, rejected = reward_model.logits(texts).chunk(2)
        loss = bradley_terry_loss(
            chosen,
            rejected,
            margin=torch.tensor([margins[i] for i in part], dtype=chosen.dtype, device=chosen.device),
            center_rewards_coefficient=args.center_rewards_coefficient,
            label_smoothing=args.label_smoothing,
        )
        if not torch.isfinite(loss):
            raise Stopped(
                f"The loss of the reward model is {loss.item()} at step {step}: lower the learning rate."
            )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - (step - 1) / steps)
        optimizer.step()
        metrics = {"loss": loss.item(), **_batch_metrics(chosen.detach(), rejected.detach())}
        metrics |= {"grad_norm": float(norm), "learning_rate": optimizer.param_groups[0]["lr"]}
        metrics |= {"epoch": step * args.batch_size / len(pairs), "num_tokens": tokens}
        if on_step(step, metrics):
            return step
    return steps


def _batch_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    difference = chosen - rejected
    return {
        "accuracy": float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean()),
        "margin": float(difference.mean()),
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
    }


def train_reward_model(args: RewardModelArguments | None = None, **options: Any) -> RewardModelResult:
    """Train a reward model; the keywords are the fields of `RewardModelArguments`.

    Objects may stand where the command line takes names: `data` rows in memory, or a dict of splits; `model`
    what `reward_backbone` takes; `task` a task; `policy` a `Policy`; `reward` functions.

    Raises:
        Refused: something was unusable before the first step.
        Stopped: the run could not go on.

    Example:
        >>> from tokenrl.language.preferences.fit import train_reward_model
        >>> result = train_reward_model(task="sort_digits", output_dir="runs/judge")
        >>> result.eval_after["accuracy"]
    """
    args = args or arguments(RewardModelArguments, options)
    _check(args)
    console = Console(quiet=args.quiet)
    with RunDirectory.create(args.output_dir, overwrite=args.overwrite) as directory:
        data = load_reward_data(args, console.note)
        reward_model = make_backbone(args, data.task, console.note)
        args = _resolve(args, data)
        encode_pairs(reward_model, data.train)  # what is too long is refused before anything is written
        console.start(f"tokenrl reward-model: {data.name}", facts(args, data, reward_model), note=LOSS_NOTE)
        return _run(args, data, reward_model, directory, console)


def _run(
    args: RewardModelArguments,
    data: RewardData,
    reward_model: RewardModel,
    directory: RunDirectory,
    console: Console,
) -> RewardModelResult:
    began, held_out = time.monotonic(), encode_pairs(reward_model, data.held_out)
    steps, every = args.max_steps or 0, args.eval_every or 1
    before = _first_evaluation(reward_model, held_out, data)
    if args.check:
        console.note("Check passed: data, model and loss work together. Nothing trained.")
        return RewardModelResult(directory.path, "check", 0, 0, before, before, [], 0.0, reward_model)
    directory.write_config(config(args, data, reward_model))
    with (
        MetricsLog(directory.metrics, directory.timings) as log,
        GracefulStop(quiet=args.quiet) as stop,
        console.progress(steps) as progress,
    ):
        log.write(0, {"eval_" + name: value for name, value in before.items()})

        def on_step(step: int, metrics: dict[str, float]) -> bool:
            if step % every == 0 and step < steps:
                now = preference_metrics(score_pairs(reward_model, held_out), data.held_out)
                metrics |= {"eval_" + name: value for name, value in now.items()}
            if step < steps and not stop.requested:  # the last line is written with the last evaluation
                log.write(step, metrics)
            progress.update(step, metrics)
            last.update(metrics)
            return stop.requested is not None

        last: dict[str, float] = {}
        try:
            made = fit_reward_model(reward_model, data.train, args, on_step)
            rewards = score_pairs(reward_model, held_out)
        except Stopped as error:
            write_failure(directory, error, before)
            raise
        after = preference_metrics(rewards, data.held_out)
        log.write(made, last | {"eval_" + name: value for name, value in after.items()})
    reason = {143: "SIGTERM", 130: "SIGINT"}.get(stop.exit_code, "finished")
    curve, seconds = calibration(rewards[:, 0] - rewards[:, 1]), time.monotonic() - began
    result = RewardModelResult(
        directory.path, reason, stop.exit_code, made, before, after, curve, seconds, reward_model
    )
    finish(directory, data, result, rewards, console)
    return result


def _first_evaluation(
    reward_model: RewardModel, held_out: Sequence[Encoded], data: RewardData
) -> dict[str, float]:
    try:
        return preference_metrics(score_pairs(reward_model, held_out), data.held_out)
    except Stopped as error:
        raise Refused(f"Before the first step: {error}") from error


def _check(args: RewardModelArguments) -> None:
    """Refuse what cannot be trained with."""
    least = {
        "batch_size": 1,
        "num_pairs": 1,
        "eval_size": 1,
        "max_steps": 1,
        "eval_every": 1,
        "hidden_size": 1,
    }
    least |= {"seed": 0, "base_seed": 0, "weight_decay": 0, "max_grad_norm": 0, "noise_temperature": 0}
    least |= {"center_rewards_coefficient": 0, "label_smoothing": 0, "max_completion_length": 1}
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= lowest):
            raise Refused(f"{name}={value}: give {lowest} or more.")
    for name in ("learning_rate", "temperature"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise Refused(f"{name}={value}: give a number above 0.")
    if args.label_smoothing >= 0.5:
        raise Refused(
            f"label_smoothing={args.label_smoothing}: from 0.5 on the labels say nothing; give less."
        )
    if not math.isfinite(args.margin):
        raise Refused(f"margin={args.margin}: give a finite number.")


def _resolve(args: RewardModelArguments, data: RewardData) -> RewardModelArguments:
    """Every None replaced, and the margin checked against the data."""
    if args.margin and any(pair.margin is not None for pair in data.train):
        raise Refused(f"margin={args.margin} and a column 'margin' were both given: give one of the two.")
    batch = min(args.batch_size, len(data.train))
    steps = args.max_steps or math.ceil(len(data.train) / batch)
    rate = args.learning_rate or (1e-3 if args.model is None else 1e-5)
    every = args.eval_every or max(1, steps // 10)
    return replace(args, batch_size=batch, max_steps=steps, learning_rate=rate, eval_every=every)
