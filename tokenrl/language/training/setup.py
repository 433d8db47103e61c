"""Makes what a run needs from its arguments: settings, policy, accelerator.

Arguments that cannot be used are refused here, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from tokenrl.core.baselines import check_horizon
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.language.policy.arguments import LoraArguments, ModelArguments
from tokenrl.language.policy.lora import add_lora
from tokenrl.language.policy.model import Policy, enable_gradient_checkpointing, load_policy, wrap
from tokenrl.language.policy.prompts import form_of, settled_form
from tokenrl.language.policy.saving import fingerprint, tokenizer_fingerprint
from tokenrl.language.rollout.agreement import agree
from tokenrl.language.tasks.memory import fingerprint as rows_fingerprint
from tokenrl.language.tasks.task import Task
from tokenrl.language.training.arguments import TrainArguments, TrainSettings
from tokenrl.language.training.defaults import Defaults, demonstrations, training_defaults
from tokenrl.language.training.supervised import check_trainable
from tokenrl.language.training.warm_start import warm_started_base
from tokenrl.runs.resume import Maker
from tokenrl.settings import settled


def resolve(args: TrainArguments, task: Task, policy: Policy | None = None) -> TrainSettings:
    """Fill in the arguments left open (see `training_defaults`), and check them.

    Without the policy, before it is loaded, what depends on its size or its tokenizer is provisional.

    Raises:
        Refused: two settings contradict each other, or there are no demonstrations for a warm start.
    """
    if args.warm_start:
        demonstrations(task)
    return settle(args, training_defaults(args, task, policy))


def settle(args: TrainArguments, found: Defaults) -> TrainSettings:
    """Fill in the arguments left open from what has been found for them, and check them.

    Raises:
        Refused: two settings contradict each other, or there is no learning rate for the optimiser.
    """
    if args.optimizer == "sgd" and args.learning_rate is None:
        raise Refused(
            "optimizer='sgd' was given without a learning_rate, and the default rates are made for AdamW. A "
            "step of AdamW at the rate r has a norm of about r x sqrt(number of weights) at most, and one of "
            "SGD learning_rate x grad_norm (a metric, at most max_grad_norm after clipping). Start with the "
            "rate that makes both equal, such as 2e-4 x sqrt(100,000) / 1, about 0.06, and try factors of 2 "
            "around it: --learning-rate 0.06."
        )
    if args.max_samples is not None:
        args = replace(args, max_steps=None)  # it follows from the samples
    settings = settled(TrainSettings, args, found.values)
    check(settings)
    return settings


def check(args: TrainSettings) -> None:
    """Refuse settings that contradict each other; the bounds of each one stand beside its field.

    Raises:
        Refused: two settings contradict each other, or the estimator refuses a step of this shape.
    """
    if args.target_kl is not None and not args.estimator.needs_kl:
        raise Refused(
            f"target_kl={args.target_kl:g} asks for a KL near that value, but the estimator has beta 0: "
            "there is no reference to measure the KL to, and a weight of 0 stays 0 when it is multiplied. "
            "Set --estimator.beta to the weight to start from, such as 0.05, or leave target_kl out."
        )
    if args.estimator.needs_groups and args.num_generations == 1:
        raise Refused(
            f"The estimator compares the completions of a prompt (baseline={args.estimator.baseline!r}, "
            f"scale={args.estimator.scale!r}), but with num_generations=1 each prompt has only one. Give 2 "
            "or more, or choose the estimator reinforce or reinforce_running_mean."
        )
    _check_tokens_differ(args.estimator)
    _try_out(args)
    check_horizon(args.estimator, args.max_completion_length, args.allow_no_baseline)
    if args.num_minibatches > args.prompts_per_step:
        raise Refused(
            f"num_minibatches={args.num_minibatches} is more than prompts_per_step={args.prompts_per_step}. "
            f"The completions of a prompt are not split, so give at most {args.prompts_per_step}."
        )
    if args.dtype == "float16":
        raise Refused("dtype='float16' cannot be trained: gradients underflow. Use bfloat16 or float32.")
    if args.estimator.ratio == "none" and args.num_iterations * args.num_minibatches > 1:
        raise Refused(
            f"num_iterations={args.num_iterations} and num_minibatches={args.num_minibatches} make several "
            "updates from one rollout, but the estimator has ratio='none', which is right only for the first "
            "of them. Use --estimator.ratio token (the presets grpo, dr_grpo and ppo_clip have it), or one "
            "update per rollout."
        )


def _check_tokens_differ(estimator: Estimator) -> None:
    """Refuse to compare the tokens of a completion where all of them have the same return."""
    within = [f"{axis} {getattr(estimator, axis)!r}" for axis in estimator.within_rows]
    penalty = estimator.needs_kl and estimator.kl_placement == "reward"  # a reward for each token
    to_go = estimator.returns in ("reward_to_go", "episode_normalized")
    if within and to_go and estimator.gamma == 1 and not penalty:
        raise Refused(
            f"{' and '.join(within)} would compare the tokens of one completion, but its reward comes at the "
            "end: with gamma 1 and no KL in the reward all its tokens have the same return, and nothing "
            "would be learnt. Compare completions instead: baseline 'rloo', returns 'total' and scale 'none'."
        )


def _try_out(args: TrainSettings) -> None:
    """Call the estimator on a step of zeros, so that it refuses wrong settings before anything is loaded."""
    n = args.prompts_per_step * args.num_generations
    zeros = torch.zeros(n, 1)
    try:
        args.estimator.advantages(
            zeros[:, 0],
            zeros + 1,
            group_size=args.num_generations,
            logprobs=zeros,
            ref_logprobs=zeros,
            values=zeros,
            greedy_rewards=zeros[:, 0],
            score_norms=zeros + 1,
            baseline_value=0.0,
            max_length=args.max_completion_length,
        )
    except Stopped as error:
        raise Refused(f"Tried on rewards of 0, before the run: {error}") from error


def check_overlong(args: TrainSettings) -> None:
    """Refuse an overlong buffer that takes the whole completion.

    Raises:
        Refused: every completion would be penalised.
    """
    if args.estimator.overlong_buffer >= args.max_completion_length:
        raise Refused(
            f"overlong_buffer={args.estimator.overlong_buffer} is not less than max_completion_length="
            f"{args.max_completion_length}, so every completion would be penalised for its length, from the "
            "first token on. Give a shorter buffer (DAPO takes a fifth of the length), or a larger "
            "max_completion_length."
        )


def without_effect(args: TrainSettings, asked: TrainArguments) -> Iterator[str]:
    """Yield a warning for each setting that was changed, but cannot do what it is for beside the others.

    Args:
        args: the settings of the run.
        asked: what was asked for.
    """
    if args.max_samples is not None and asked.max_steps not in (None, args.max_steps):
        yield (
            f"max_steps={asked.max_steps} has no effect, because max_samples={args.max_samples} says how "
            f"long the run is: {args.max_steps} steps or fewer. Leave one of the two out."
        )
    if args.warmup_steps >= args.max_steps:
        yield (
            f"warmup_steps={args.warmup_steps} is not less than max_steps={args.max_steps}, so the learning "
            f"rate never reaches {args.learning_rate:g}. Give fewer; a tenth of the run is usual."
        )
    needs = {
        "max_refills": (args.estimator.zero_spread == "refill", "zero_spread is not 'refill'"),
        "value_learning_rate": (args.estimator.needs_values, "the estimator has no critic"),
        "value_iterations": (args.estimator.needs_values, "the estimator has no critic"),
        "kl_gain": (args.target_kl is not None, "target_kl is not set"),
        "warm_start_steps": (args.warm_start, "warm_start is not set"),
    }
    usual = {field.name: field.default for field in fields(args)}
    for name, (is_met, why) in needs.items():
        value = getattr(args, name)
        if value != usual[name] and not is_met:
            yield f"{name}={value} has no effect, because {why}. Leave it out, or set what it needs."


def make_policy(args: ModelArguments, task: Any, announce: Callable[[str], None]) -> Policy:
    """Load the policy that the arguments name, and add the adapter that they ask for.

    Raises:
        Refused: the model cannot be loaded, cannot be asked as the arguments say, or cannot be trained.
    """
    policy = load_base(args, task, announce)
    adapt(args, policy)
    return policy


def load_base(args: ModelArguments, task: Any, announce: Callable[[str], None]) -> Policy:
    """Load the policy that the arguments name (object, directory or hub name), else the task's base model.

    Raises:
        Refused: the model cannot be loaded.
    """
    source: Any = args.model
    if source is None:
        source = str(warm_started_base(task, seed=args.base_seed, announce=announce))
    if isinstance(source, Policy):
        policy = source
    elif isinstance(source, tuple):
        policy = wrap(*source, source=type(source[0]).__name__)
    else:
        policy = load_policy(source, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    policy.ask(form_of(settled_form(args)))
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(policy)
    return policy


def adapt(args: ModelArguments, policy: Policy) -> None:
    """Add the LoRA adapter that the arguments ask for, if any.

    Raises:
        Refused: the adapter does not fit, or the model cannot be trained.
    """
    if isinstance(args, LoraArguments) and args.lora_r:
        modules, seed = args.lora_target_modules, getattr(args, "seed", 0)
        add_lora(policy, r=args.lora_r, alpha=args.lora_alpha, target_modules=modules, seed=seed)
    check_trainable(policy)


def make_accelerator(args: TrainSettings) -> Any:
    """Make accelerate's handle of device, precision and processes.

    Raises:
        Refused: accelerate refuses the settings, or the processes cannot share the prompts equally.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    # accelerate remembers the device and the precision of the first run of a program; each run has its own.
    alone = PartialState._shared_state.get("num_processes") == 1  # else processes must not be joined again
    AcceleratorState._reset_state(reset_partial_state=alone)
    try:
        # Without a GPU accelerate joins the processes that torchrun has started only if it is told so.
        cpu = args.cpu or not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=cpu, mixed_precision="no")
    except ValueError as error:
        raise Refused(f"accelerate cannot be set up as asked: {' '.join(str(error).split())}") from error
    world, prompts = accelerator.num_processes, args.prompts_per_step
    if prompts % world:
        down, up = prompts // world * world, (prompts // world + 1) * world
        raise Refused(
            f"prompts_per_step={prompts} cannot be shared equally by {world} processes; groups are not "
            "split. Give " + (f"{down} or {up}." if down else f"{up}.")
        )
    return accelerator


def made_from(policy: Policy, rows: Mapping[str, Sequence[Any]], accelerator: Any = None) -> Maker:
    """Describe what a run is made from, before its first step: only with the same can it be continued.

    Args:
        policy: the policy, with the weights that it starts from.
        rows: all rows of data that decide what is learnt, in named parts.
        accelerator: accelerate's handle of device and processes; None for one process without it.
    """
    fingerprints = {
        "data": rows_fingerprint(rows),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "base model": fingerprint(policy.model),
    }
    if accelerator is None:
        return Maker(fingerprints, device=policy.device.type)
    return Maker(fingerprints, accelerator.num_processes, accelerator.device.type)


def load_placed(name: str, *, dtype: str, trust_remote_code: bool) -> Policy:
    """Load a model and move it to the accelerator's device; without an accelerator that is the CPU."""
    from accelerate import PartialState

    policy = load_policy(name, dtype=dtype, trust_remote_code=trust_remote_code)
    policy.model.to(PartialState().device)
    agree(policy, gradient=False)
    return policy
