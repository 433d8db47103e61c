"""Makes the settings of a training run: lays the layers over each other, and refuses contradictions."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from tokenrl.core.refusals import check_horizon
from tokenrl.errors import Refused, Stopped
from tokenrl.language.policy.model import Policy
from tokenrl.language.supervised.defaults import completion_limit, demonstrations, layers_below
from tokenrl.language.tasks.task import PromptTask, is_unrewarded
from tokenrl.language.training.arguments import OWN, TrainArguments
from tokenrl.language.training.engines import engine_of
from tokenrl.runs.processes import overruled
from tokenrl.settings import arguments, lay


def sizes_of_steps(args: TrainArguments) -> tuple[int, int]:
    """Return the completions of a plain step, and of a step with greedy ones if the estimator needs them."""
    prompts = args.prompts_per_step
    generations = args.num_generations
    return prompts * generations, prompts * (
        generations + ("greedy_rewards" in args.estimator.needs)
    )


class TrainPlan(NamedTuple):
    """The settings of a run, complete but for those that the machine decides.

    Attributes:
        args: the settings.
        origins: where the value of each comes from, in words.
        usual_rate: the learning rate of a run that leaves it open; None if unknown, as without AdamW.
        warnings: a sentence for each setting that was changed but has no effect.
    """

    args: TrainArguments
    origins: dict[str, str]
    usual_rate: float | None
    warnings: tuple[str, ...]


def settle(
    choices: TrainArguments,
    task: PromptTask,
    policy: Policy,
    *,
    has_state: bool = False,
    processes: int = 1,
) -> TrainPlan:
    """Lay what was given over what the task recommends and over the defaults; refuse sizes that do not fit.

    Args:
        choices: what was given, after `check_choices`.
        task: the task.
        policy: the policy, which needs no weights.
        has_state: whether a reward has a state, so that no evaluation is made unless it is asked for.
        processes: the number of processes of the run.

    Raises:
        Refused: a size contradicts another, or the estimator refuses a step of this shape.
    """
    layers = layers_below(choices, task, policy)
    usual, _ = lay(*layers)
    if choices.max_completion_length is None:
        limit, origin = completion_limit(
            task, choices.model, policy, truncate=choices.truncate_prompts
        )
        layers.append((origin, {"max_completion_length": limit}))
    values, origins = lay(*layers, ("given", vars(choices)))
    if values["eval_every"] is None:
        values["eval_every"] = 0 if has_state else _evaluation_interval(values, task)
    if values["log_completions"] is None:
        values["log_completions"] = values["eval_every"]
    args = arguments(TrainArguments, values)
    _check_sizes(args, processes)
    usual_rate = usual["learning_rate"] if args.optimizer == "adamw" else None
    return TrainPlan(args, origins, usual_rate, tuple(without_effect(args)))


def _evaluation_interval(values: Mapping[str, Any], task: Any) -> int:
    """Return the steps between evaluations of a run that leaves them open, from its other settings."""
    every = max(1, values["max_steps"] // 10)
    if values["model"] is None:
        return every
    # to evaluate a completion takes up to two thirds of learning from it
    evaluated = len(task.eval_prompts) * (1 + values["eval_generations"])
    completions = values["prompts_per_step"] * values["num_generations"]
    return max(every, math.ceil(20 * evaluated / 3 / completions))


OFF = ("", "no", "none", "false", "0", "1", "default")
"""Values with which the others change nothing, as `accelerate launch` sets them."""


def check_choices(args: TrainArguments, task: PromptTask) -> None:
    """Refuse choices that contradict each other whatever the model is; bounds stand beside each field.

    Args:
        args: what was given, of which some is open.
        task: the task; its environment may reward each turn.

    Raises:
        Refused: two choices contradict each other, there is no learning rate for the optimiser, or there are
            no demonstrations for a warm start.
    """
    estimator = args.estimator
    episodic = task.environment is not None
    updates = args.num_iterations * args.num_minibatches
    if args.warm_start:
        demonstrations(task)
    if args.optimizer == "sgd" and args.learning_rate is None:
        raise Refused(
            "optimizer='sgd' was given without a learning_rate; 0.06 is a start, in factors of 2."
        )
    _check_teacher(args)
    if args.target_kl is not None and not estimator.beta:
        raise Refused(
            "target_kl holds a KL, but the estimator has beta 0: give it one (--estimator.beta)."
        )
    within = " and ".join(f"{axis} {getattr(estimator, axis)!r}" for axis in estimator.within_rows)
    penalty = estimator.kl_in_reward  # a reward for each token
    to_go = estimator.returns in ("reward_to_go", "episode_normalized")
    if within and to_go and estimator.gamma == 1 and not (penalty or episodic):
        raise Refused(
            f"{within} would compare the tokens of one completion, which have the same return, as its reward "
            "comes at the end. Take baseline 'rloo', returns 'total' and scale 'none'."
        )
    engine = engine_of(args)
    if args.top_p < 1 and args.min_p and not engine.abilities.min_p_last:
        raise Refused(
            f"{engine.name} applies min_p before top_p, and scoring after it: give top_p or min_p, not both."
        )
    if args.sync_every > 1 and ("greedy_rewards" in estimator.needs or not engine.lags):
        raise Refused(
            f"sync_every was given as {args.sync_every}; weights of earlier steps sample with the generator "
            "transformers or an engine that has announce, and without greedy completions (baseline remax)."
        )
    lowest, highest = engine.abilities.temperatures
    if not lowest <= args.temperature <= highest:
        raise Refused(
            f"temperature was given as {args.temperature:g}; {engine.name} samples from {lowest:g} to {highest:g}."
        )
    if args.replay and (episodic or estimator.importance_centre):
        raise Refused(
            f"replay was given as {args.replay}; it repeats completions of one turn, without an environment, and "
            "without importance_centre, as no distribution of the sampler is kept."
        )
    if "old_logprobs" not in estimator.needs and updates > 1:
        raise Refused(
            f"num_iterations x num_minibatches makes {updates} updates of a rollout, but ratio='none' is "
            "right for the first only. Use ratio='token' (--estimator.ratio token), as grpo, dr_grpo and ppo_clip do."
        )


def _check_teacher(args: TrainArguments) -> None:
    """Refuse a teacher that nothing is learnt from, and what needs a teacher without one."""
    estimator = args.estimator
    if args.teacher_decay is not None and args.teacher != OWN:
        raise Refused(
            f"teacher_decay={args.teacher_decay:g} averages the policy's weights, which is for the teacher self "
            "(--teacher self)."
        )
    for name in ("teacher_template", "teacher_context"):
        if args.teacher is None and getattr(args, name) is not None:
            raise Refused(
                f"{name} makes what a teacher reads, and there is none: name one by teacher, such as --teacher self."
            )
    if args.teacher is not None and not estimator.beta:
        raise Refused(
            "A teacher is the reference of a KL, and the estimator has none, as its beta is 0: give "
            "it one (--estimator.beta), such as 1, or a preset of distillation, such as opd."
        )
    if not is_unrewarded(args.reward):
        return
    if args.teacher is None or not estimator.beta:
        raise Refused(
            "With reward none all that there is to learn from is the KL to a teacher: name one by teacher (--teacher), "
            "and give the estimator a beta (--estimator.beta), such as 1, or a preset of distillation, such as opd."
        )
    if estimator.zero_spread != "keep" or estimator.other_objective:
        axis = "objective" if estimator.other_objective else "zero_spread"
        raise Refused(
            f"With reward none all rewards are 0, and {axis} {getattr(estimator, axis)!r} needs rewards: take "
            "zero_spread 'keep' and objective 'reward'."
        )


def _check_sizes(args: TrainArguments, processes: int) -> None:
    """Refuse a step that the estimator, the length of completions or the number of processes does not allow."""
    buffer = args.estimator.overlong_buffer
    length = args.max_completion_length
    prompts = args.prompts_per_step
    if buffer >= length:
        raise Refused(f"overlong_buffer={buffer} is not less than max_completion_length={length}.")
    _try_out(args)
    # Without rewards there is no return from which a baseline could be subtracted.
    if not is_unrewarded(args.reward):
        check_horizon(args.estimator, length, args.allow_no_baseline)
    if args.num_minibatches > prompts:
        limit = f"prompts_per_step={prompts}, as the completions of a prompt are not split"
        raise Refused(f"num_minibatches={args.num_minibatches} is more than {limit}.")
    if prompts % processes:
        down = prompts // processes * processes
        up = (prompts // processes + 1) * processes
        valid = f"{down} or {up}" if down else up
        problem = f"prompts_per_step={prompts} cannot be shared equally by {processes} processes"
        raise Refused(f"{problem}. Give {valid}.")


def _try_out(args: TrainArguments) -> None:
    """Call the estimator on a step of zeros, so that it refuses wrong settings before the first step."""
    zeros = torch.zeros(args.prompts_per_step * args.num_generations, 1)
    inputs: dict[str, Any] = dict.fromkeys(
        ("logprobs", "ref_logprobs", "values", "components"), zeros
    )
    inputs |= {
        "group_size": args.num_generations,
        "max_length": args.max_completion_length,
        "greedy_rewards": zeros[:, 0],
        "score_norms": zeros + 1,
        "baseline_value": zeros[:, 0],
    }
    try:
        args.estimator.advantages(zeros[:, 0], zeros + 1, **inputs)
    except Stopped as error:
        raise Refused(f"Tried on rewards of 0, before the run: {error}") from error


def without_effect(args: TrainArguments) -> Iterator[str]:
    """Yield a warning for each setting, or variable, that was changed but has no effect with the others."""
    if loud := [
        f"{name}={os.environ[name]}" for name in overruled() if os.environ[name].lower() not in OFF
    ]:
        have = "have" if len(loud) > 1 else "has"
        yield f"{', '.join(loud)} {have} no effect: a run computes as its recorded settings say."
    if args.warmup_steps >= args.max_steps:
        less = f"is not less than max_steps={args.max_steps}, so the learning rate stays below its peak"
        yield f"warmup_steps={args.warmup_steps} {less}."
    critic = "values" in args.estimator.needs, "the estimator has no critic"
    needs = {
        "replay_memory": (args.replay, "replay is 0"),
        "max_refills": (args.estimator.zero_spread == "refill", "zero_spread is not 'refill'"),
        "value_learning_rate": critic,
        "value_iterations": critic,
        "on_reward_timeout": (args.reward_timeout is not None, "reward_timeout is not set"),
        "allow_own_feedback": (args.teacher_context, "teacher_context is not set"),
        "kl_gain": (args.target_kl is not None, "target_kl is not set"),
        "warm_start_steps": (args.warm_start, "warm_start is not set"),
    }
    for name, (is_met, reason) in needs.items():
        value = getattr(args, name)
        if value != getattr(TrainArguments, name) and not is_met:
            yield f"{name}={value} has no effect, because {reason}."
