"""Makes the settings of a training run from layers, refuses contradictions, and writes the lines of the header."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from tokenrl.core.bias import estimator_line, objective_line
from tokenrl.core.refusals import check_horizon
from tokenrl.core.schedules import check_warmup
from tokenrl.errors import Refused, Stopped
from tokenrl.language.policy.arguments import form_line
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.supervised.arguments import RECOMMENDED
from tokenrl.language.supervised.base import vocabulary_of
from tokenrl.language.supervised.defaults import (
    completion_limit,
    demonstrations,
    layers_below,
    with_origins,
)
from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.task import PromptTask, find_task, is_unrewarded
from tokenrl.language.training.arguments import OWN, KlArguments, TrainArguments, with_advice
from tokenrl.language.training.engines import engine_of
from tokenrl.language.training.logged import read_log
from tokenrl.language.training.teacher import Teacher
from tokenrl.language.training.teacher_prompts import TeacherPrompts, teacher_prompts
from tokenrl.settings import arguments, lay, part_of


class TrainPlan(NamedTuple):
    """The settings of a run, complete but for those that the machine decides.

    Attributes:
        args: the settings.
        origins: where the value of each comes from, in words.
        usual_rate: the learning rate of a run that leaves it open; nan if unknown, as without AdamW.
    """

    args: TrainArguments
    origins: dict[str, str]
    usual_rate: float


def settle(
    choices: TrainArguments,
    task: PromptTask,
    policy: Policy,
    origins: dict[str, str] | None = None,
    has_state: bool = False,
    processes: int = 1,
) -> TrainPlan:
    """Lay settings over what the task recommends for its model and over the defaults; refuse sizes that do not fit.

    Args:
        choices: what was given, as `task_of` returns it.
        task: the task.
        policy: the policy, which needs no weights.
        origins: where values come from that `with_advice` laid; the others were given.
        has_state: whether a reward has a state: then no evaluation is made unless it is asked for.
        processes: the number of processes of the run.

    Raises:
        Refused: a size contradicts another, or the estimator refuses a step of this shape.
    """
    layers = layers_below(choices, task, policy)
    usual_rate = lay(*layers)[0]["learning_rate"]
    if choices.max_completion_length is None:
        limit, origin = completion_limit(
            task, choices.model, policy, truncate=choices.truncate_prompts
        )
        layers.append((origin, {"max_completion_length": limit}))
    values, laid = lay(*layers, ("given", vars(choices)))
    laid |= origins or {}
    if values["eval_every"] is None:
        values["eval_every"] = 0 if has_state else _evaluation_interval(values, task)
    if values["log_completions"] is None:
        values["log_completions"] = values["eval_every"]
    args = arguments(TrainArguments, values)
    _check_sizes(args, task, processes)
    return TrainPlan(args, laid, usual_rate if args.optimizer == "adamw" else math.nan)


def _evaluation_interval(values: Mapping[str, Any], task: Any) -> int:
    """Return the steps between evaluations of a run that leaves them open, from its other settings."""
    every = max(1, values["max_steps"] // 10)
    if values["model"] is None:
        return every
    # to evaluate a completion takes up to two thirds of learning from it
    evaluated = len(task.eval_prompts) * (1 + values["eval_generations"])
    completions = values["prompts_per_step"] * values["num_generations"]
    return max(every, math.ceil(20 * evaluated / 3 / completions))


SHOWN = ("baseline", "scale", "aggregation", "ratio", "beta")
"""The axes that the header of a run shows, whatever they are."""


def task_of(
    choices: TrainArguments, processes: int = 1, keywords: Collection[str] = ()
) -> tuple[TrainArguments, dict[str, str], PromptTask, Rewards, TeacherPrompts | None, Rows | None]:
    """Return settings and origins, see `with_advice`, task and rewards, how the teacher's prompts are made, and a log.

    Raises:
        Refused: one of them cannot be used, or choices contradict each other whatever the model is.
    """
    task, rewards = find_task(choices, may_lack_rewards=True)
    if rewards.keepers:  # evaluations spend what a reward counts only where a user asks for them
        task.train = {name: x for name, x in task.train.items() if name != "eval_every"}
    choices, origins = with_advice(choices, task, keywords)
    check_choices(choices, task, processes)
    prompts = teacher_prompts(part_of(choices, KlArguments), task)
    if prompts is None and choices.teacher == OWN and is_unrewarded(choices.reward):
        raise Refused(
            "The teacher is the policy itself and reads the same prompts, so that with reward none there is "
            "nothing to learn: give it more to read by teacher_template (--teacher-template), teacher_context, "
            "or a column teacher_prompt of the data."
        )
    if rewards.keepers and processes > 1:
        raise Refused(
            "A reward with a state_dict would have another state in each process of this run: start one process, "
            "or take a reward without state_dict."
        )
    needs_evaluations = choices.patience or choices.keep == "best"
    if rewards.keepers and choices.eval_every is None and needs_evaluations:
        raise Refused(
            "The best checkpoint needs evaluations, and none are made, as they would spend what the reward "
            "counts: give eval_every (--eval-every), or leave keep and patience out."
        )
    return choices, origins, task, rewards, prompts, read_log(choices, task, prompts is not None)


def check_choices(args: TrainArguments, task: PromptTask, processes: int = 1) -> None:
    """Refuse choices that contradict each other whatever the model is; bounds stand beside each field.

    Args:
        args: what was given, of which some is open.
        task: the task; its environment may reward each turn.
        processes: the number of processes of the run.

    Raises:
        Refused: two choices contradict each other, or a learning rate or demonstrations are missing.
    """
    estimator = args.estimator
    episodic = task.environment is not None
    if args.warm_start:
        demonstrations(task)
    if args.optimizer != "adamw" and args.learning_rate is None:
        raise Refused(
            f"optimizer={args.optimizer!r} was given without a learning_rate; 0.06 is a start for sgd, and 0.001 for "
            "muon, in factors of 2."
        )
    if args.optimizer == "muon" and args.lora_r:
        raise Refused(
            "optimizer 'muon' is for all weights of a model, and lora_r trains an adapter: take adamw or lora_r 0."
        )
    _check_teacher(args)
    uneven = args.prompt_weights != "uniform" or estimator.zero_spread == "refill"
    if args.control_arm != "none" and (episodic or uneven or is_unrewarded(args.reward)):
        raise Refused(
            f"control_arm {args.control_arm!r} is for rewards of completions of one turn, and for prompts that are "
            "drawn equally often: take a task with a reward and without an environment, prompt_weights 'uniform', and "
            "zero_spread 'keep' or 'drop'."
        )
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
    engine = engine_of(args.generator, args.generator_cache)
    if processes > 1 and not engine.abilities.distributed:
        raise Refused(
            f"{engine.name} samples in a run of one process, and this run has {processes}: take transformers."
        )
    engine.abilities.check(args, engine.name)
    if args.sync_every > 1 and ("greedy_rewards" in estimator.needs or not engine.lags):
        raise Refused(
            f"sync_every was given as {args.sync_every}; weights of earlier steps sample with the generator "
            "transformers or an engine that has announce, and without greedy completions (baseline remax)."
        )
    if estimator.importance_centre and not engine.is_default:
        raise Refused(
            "importance_centre needs the sampler's probabilities of all tokens, which only the generator "
            "transformers returns. Take it, or set importance_centre to False."
        )
    if args.replay and (episodic or estimator.importance_centre):
        raise Refused(
            f"replay was given as {args.replay}; it repeats completions of one turn, without an environment, and "
            "without importance_centre, as no distribution of the sampler is kept."
        )
    if "old_logprobs" not in estimator.needs and args.updates > 1:
        raise Refused(
            f"num_iterations x num_minibatches makes {args.updates} updates of a rollout, but ratio='none' is "
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
    if args.teacher is not None and not estimator.needs_reference:
        raise Refused(
            "A teacher is the reference of a KL, and the estimator has none, as its beta is 0: give "
            "it one (--estimator.beta), such as 1, or a preset of distillation, such as opd."
        )
    if not is_unrewarded(args.reward):
        return
    if args.teacher is None:
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


def _check_sizes(args: TrainArguments, task: PromptTask, processes: int) -> None:
    """Refuse a step that the estimator, the length of completions or the number of processes does not allow."""
    buffer = args.estimator.overlong_buffer
    length = args.max_completion_length
    prompts = args.prompts_per_step
    if buffer >= length:
        raise Refused(f"overlong_buffer={buffer} is not less than max_completion_length={length}.")
    check_warmup(args)
    _try_out(args, task)
    # Without rewards there is no return from which a baseline could be subtracted.
    if not is_unrewarded(args.reward):
        check_horizon(args.estimator, length, args.allow_no_baseline)
    if args.num_minibatches > prompts:
        raise Refused(
            f"num_minibatches={args.num_minibatches} is more than prompts_per_step={prompts}, as the completions of "
            "a prompt are not split."
        )
    if prompts % processes:
        down = prompts // processes * processes
        up = down + processes
        valid = f"{down} or {up}" if down else up
        raise Refused(
            f"prompts_per_step={prompts} cannot be shared equally by {processes} processes. Give {valid}."
        )


def _try_out(args: TrainArguments, task: PromptTask) -> None:
    """Call the estimator on a step of zeros, so that it refuses wrong settings before the first step."""
    zeros = torch.zeros(args.completions, 1)
    rewards = zeros[:, 0]
    ones = zeros + 1
    of_tokens = ("logprobs", "ref_logprobs", "sampling_logprobs", "entropy", "values", "components")
    row = task.train_prompts[0] if callable(args.estimator.baseline) else {}
    try:
        args.estimator.advantages(
            rewards,
            ones,
            group_size=args.num_generations,
            max_length=args.max_completion_length,
            **dict.fromkeys(of_tokens, zeros),
            greedy_rewards=rewards,
            score_norms=ones,
            baseline_value=rewards,
            data={name: [value] * len(zeros) for name, value in row.items()},
        )
    except Stopped as error:
        raise Refused(f"Tried on rewards of 0, before the run: {error}") from error


def evaluates(args: TrainArguments, rewards: Rewards) -> bool:
    """Return whether the policy is evaluated: always, unless that spends unasked what a reward counts."""
    return not rewards.keepers or bool(args.eval_every)


def first_facts(
    choices: TrainArguments, origins: dict[str, str], run: str, task: PromptTask, rewards: Rewards
) -> dict[str, Any]:
    """Return the lines of the header that are known before the model is loaded."""
    names = ", ".join(rewards.names)
    if is_unrewarded(choices.reward):
        kl = "the KL"
        if choices.teacher_context is not None:
            kl = "no KL, as teacher_context is called in steps"
        names = f"none: what is learnt is to lower the KL to the teacher; evaluated: {names or kl}"
    estimator = choices.estimator
    stage = ""
    if choices.warm_start:
        skipped = " unless the rule of auto skips it" if choices.warm_start == "auto" else ""
        stage = f"a warm start of {choices.warm_start_steps} updates{skipped}, "
    order = "an evaluation, training steps with evaluations in between"
    if not evaluates(choices, rewards):
        order = (
            "training steps alone, as evaluations would spend what the reward counts (--eval-every)"
        )
    goal = choices.stop_at_reward
    advice = [f"{name} {vars(choices)[name]}" for name, x in origins.items() if x == RECOMMENDED]
    return {
        "task": division_of(task, choices.eval_size)[0],
        "reward": names,
        "estimator": estimator_line(estimator, SHOWN, choices.bias_status),
        **objective_line(estimator),
        **({} if goal is None else {"ends": f"once a completion has a reward of at least {goal}"}),
        "order": f"{stage}{order}",
        **({"settings": f"{', '.join(advice)} ({RECOMMENDED})"} if advice else {}),
        "seed": choices.seed,
        "run": run,
    }


def model_facts(plan: TrainPlan, policy: Policy, teacher: Teacher | None) -> dict[str, Any]:
    """Return the lines of the header that are known once the model is loaded."""
    args = plan.args
    line = partial(with_origins, plan.origins)
    sizes = {
        "max_steps": f"{args.max_steps} steps",
        "prompts_per_step": f"{args.prompts_per_step} prompts",
        "num_generations": f"{args.num_generations} completions",
    }
    schedule = args.lr_scheduler_type
    rate = line(learning_rate=f"{args.learning_rate:g}", lr_scheduler_type=schedule)
    return {
        "model": f"{policy.source} ({policy.size:,} parameters{vocabulary_of(policy)}, {args.dtype})",
        **({} if teacher is None else {"teacher": teacher.line}),
        "training": line(" x ", **sizes),
        "completions": line(max_completion_length=f"up to {args.max_completion_length} tokens"),
        "learning rate": rate if args.optimizer == "adamw" else f"{rate}, {args.optimizer}",
        **({"critic": f"learns alone for {args.value_warmup} steps"} if args.value_warmup else {}),
        **form_line(policy.form, args.model),
    }
