"""Makes what a run needs from its arguments: settings, policy, accelerator.

Arguments that cannot be used are refused here, before anything is trained.
"""

from __future__ import annotations

import importlib
import os
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tokenrl.core.baselines import check_horizon
from tokenrl.core.memories import memory_of, read
from tokenrl.errors import Refused, Stopped
from tokenrl.language.policy.arguments import TINY
from tokenrl.language.policy.loading import device_for
from tokenrl.language.policy.model import (
    Policy,
    add_lora,
    enable_gradient_checkpointing,
    load_policy,
    wrap,
)
from tokenrl.language.policy.prompts import fill_form, form_of
from tokenrl.language.policy.saving import fingerprint, tokenizer_fingerprint
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rollout.agreement import check_scoring
from tokenrl.language.rollout.generator import Generator, TransformersGenerator
from tokenrl.language.rollout.vllm import VllmGenerator
from tokenrl.language.tasks.records import fingerprint as rows_fingerprint
from tokenrl.language.tasks.task import Task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.defaults import demonstrations, training_defaults
from tokenrl.language.training.supervised import check_trainable
from tokenrl.language.training.warm_start import warm_started_base
from tokenrl.runs.resume import Provenance
from tokenrl.settings import Layered

WRITTEN = f"{string.printable[:95]}\n"
"""What environments are taken to write, for the vocabulary of a tiny model: printable ASCII."""


HEEDED = (
    "USE_CPU",
    "TORCH_DEVICE",
    "CPU_AFFINITY",
    "NUM_PROCESSES",
    "DEBUG_MODE",
    "LOG_LEVEL",
    "ENABLE_RICH",
)
"""Variables of accelerate, without their prefix, that say where a run computes and not what."""
OFF = ("", "no", "none", "false", "0", "1", "default")
"""Values with which the others change nothing, as `accelerate launch` sets them."""


def train_settings(args: Any, task: Task, policy: Policy | None = None) -> TrainArguments:
    """Return the settings of a run of these arguments, complete and checked (see `fill_defaults`)."""
    return TrainArguments(**vars(fill_defaults(args, task, policy).values))


def fill_defaults(choices: Any, task: Task, policy: Policy | None = None) -> Layered:
    """Lay what was given over the defaults (see `training_defaults`), and refuse what contradicts itself.

    Without the policy, before it is loaded, what depends on its size or its tokenizer is provisional.

    Raises:
        Refused: two settings contradict each other, there is no learning rate for the optimiser, or there are
            no demonstrations for a warm start.
    """
    if choices.warm_start:
        demonstrations(task)
    if choices.optimizer == "sgd" and choices.learning_rate is None:
        raise Refused(
            "optimizer='sgd' was given without a learning_rate; 0.06 is a start, in factors of 2."
        )
    filled = training_defaults(choices, task, policy)
    buffer, length = choices.estimator.overlong_buffer, filled.values.max_completion_length
    if policy is not None and buffer >= length:  # else the length may be provisional
        raise Refused(f"overlong_buffer={buffer} is not less than max_completion_length={length}.")
    check(filled.values, episodic=getattr(task, "environment", None) is not None)
    return filled


def check(args: TrainArguments, *, episodic: bool = False) -> None:
    """Refuse settings that contradict each other; the bounds of each one stand beside its field.

    Args:
        args: the settings.
        episodic: whether an environment answers, which may reward each turn.

    Raises:
        Refused: two settings contradict each other, or the estimator refuses a step of this shape.
    """
    estimator, updates = args.estimator, args.num_iterations * args.num_minibatches
    if args.target_kl is not None and not estimator.needs_kl:
        raise Refused("target_kl holds a KL, but the estimator has beta 0: give --estimator.beta.")
    within = " and ".join(f"{axis} {getattr(estimator, axis)!r}" for axis in estimator.within_rows)
    penalty = estimator.needs_kl and estimator.kl_placement == "reward"  # a reward for each token
    to_go = estimator.returns in ("reward_to_go", "episode_normalized")
    if within and to_go and estimator.gamma == 1 and not (penalty or episodic):
        raise Refused(
            f"{within} would compare the tokens of one completion, which have the same return, as its reward "
            "comes at the end. Take baseline 'rloo', returns 'total' and scale 'none'."
        )
    _try_out(args)
    check_horizon(estimator, args.max_completion_length, args.allow_no_baseline)
    if args.num_minibatches > args.prompts_per_step:
        limit = f"prompts_per_step={args.prompts_per_step}, as the completions of a prompt are not split"
        raise Refused(f"num_minibatches={args.num_minibatches} is more than {limit}.")
    if args.diagnostics_every and args.num_minibatches == args.prompts_per_step:
        shape = f"num_minibatches={args.num_minibatches}, prompts_per_step={args.prompts_per_step}"
        raise Refused(
            f"diagnostics_every compares two halves of an update's prompts, but {shape} leaves one prompt "
            "in an update: take fewer minibatches or more prompts, or diagnostics_every=0."
        )
    if args.generator == "vllm" and args.top_p < 1 and args.min_p:
        raise Refused(
            "vllm applies min_p before top_p, and scoring after it: give top_p or min_p, not both."
        )
    if args.generator == "vllm" and not 0.01 <= args.temperature <= 2:
        raise Refused(
            f"temperature was given as {args.temperature:g}; vllm samples from 0.01 to 2."
        )
    if args.dtype == "float16":
        raise Refused(
            "dtype='float16' cannot be trained: gradients underflow. Use bfloat16 or float32."
        )
    if estimator.ratio == "none" and updates > 1:
        raise Refused(
            f"num_iterations x num_minibatches makes {updates} updates of a rollout, but ratio='none' is "
            "right for the first only. Use --estimator.ratio token (as grpo, dr_grpo and ppo_clip do)."
        )


def _try_out(args: TrainArguments) -> None:
    """Call the estimator on a step of zeros, so that it refuses wrong settings before anything is loaded."""
    zeros = torch.zeros(args.prompts_per_step * args.num_generations, 1)
    inputs: dict[str, Any] = dict.fromkeys(
        ("logprobs", "ref_logprobs", "values", "components"), zeros
    )
    inputs |= {"group_size": args.num_generations, "max_length": args.max_completion_length}
    inputs |= {"greedy_rewards": zeros[:, 0], "score_norms": zeros + 1}
    try:
        inputs["baseline_value"] = read(memory_of(args.estimator), zeros[:, 0].long())
        args.estimator.advantages(zeros[:, 0], zeros + 1, **inputs)
    except Stopped as error:
        raise Refused(f"Tried on rewards of 0, before the run: {error}") from error


def without_effect(args: TrainArguments, max_steps: int | None) -> Iterator[str]:
    """Yield a warning for each setting, or variable, that was changed but has no effect with the others.

    Args:
        args: the settings of the run.
        max_steps: the number of steps that the user gave; None if none was given.
    """
    if args.max_samples is not None and max_steps not in (None, args.max_steps):
        limit = f"max_samples={args.max_samples} says how long the run is: {args.max_steps} steps or fewer"
        yield f"max_steps={max_steps} has no effect, because {limit}."
    if loud := [
        f"{name}={os.environ[name]}" for name in overruled() if os.environ[name].lower() not in OFF
    ]:
        have = "have" if len(loud) > 1 else "has"
        yield f"{', '.join(loud)} {have} no effect: a run computes as its recorded settings say."
    if args.warmup_steps >= args.max_steps:
        less = f"is not less than max_steps={args.max_steps}, so the learning rate stays below its peak"
        yield f"warmup_steps={args.warmup_steps} {less}."
    critic = args.estimator.needs_values, "the estimator has no critic"
    needs = {
        "max_refills": (args.estimator.zero_spread == "refill", "zero_spread is not 'refill'"),
        "value_learning_rate": critic,
        "value_iterations": critic,
        "kl_gain": (args.target_kl is not None, "target_kl is not set"),
        "warm_start_steps": (args.warm_start, "warm_start is not set"),
    }
    for name, (is_met, reason) in needs.items():
        value = getattr(args, name)
        if value != getattr(TrainArguments, name) and not is_met:
            yield f"{name}={value} has no effect, because {reason}."


def make_policy(args: Any, task: Any, announce: Callable[[str], None]) -> Policy:
    """Load the policy that the arguments name, and add the adapter that they ask for.

    Raises:
        Refused: the model cannot be loaded, cannot be asked as the arguments say, or cannot be trained.
    """
    policy = load_base(args, task, announce)
    adapt(args, policy)
    return policy


def load_base(args: Any, task: Any, announce: Callable[[str], None]) -> Policy:
    """Load the policy that the arguments name (object, directory or hub name), else the task's base model.

    Raises:
        Refused: the model cannot be loaded.
    """
    source: Any = args.model
    if source is None:
        source = str(warm_started_base(task, seed=args.base_seed, announce=announce))
    if source == TINY and not os.path.isdir(TINY):
        policy = make_tiny(args, task)
    elif isinstance(source, Policy):
        policy = source
    elif isinstance(source, tuple | list):
        policy = wrap(*source, source=type(source[0]).__name__)
    else:
        policy = load_policy(source, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    policy.ask(form_of(fill_form(args)))
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(policy)
    return policy


def make_tiny(args: Any, task: Any) -> Policy:
    """Make a tiny model with random weights: that of a toy task before its warm start, or one for any rows.

    Args:
        args: the arguments of a command; the weights depend on the vocabulary and on `base_seed` alone.
        task: the task; held-out rows and demonstrations count for the vocabulary too.
    """
    build = getattr(task, "build", None)
    if build is None:
        rows = [
            *task.train_prompts,
            *task.eval_prompts,
            *(getattr(task, "demonstrations", None) or ()),
        ]
        form = {"texts": (args.system_prompt or "", *(args.stop or ())), "chat": bool(args.chat)}
        if getattr(task, "environment", None) is not None:
            rows.append({"prompt": WRITTEN})
            form["tools"] = Environments(task.environment).has_tools
        room = max(1024, getattr(args, "max_completion_length", None) or 0)
        build = partial(
            importlib.import_module("toy_tasks.models").model_for_rows, rows, room=room, **form
        )
    policy = wrap(*build(args.base_seed), source=TINY)
    policy.model.to(getattr(torch, args.dtype.replace("auto", "float32")))
    return policy


def adapt(args: Any, policy: Policy) -> None:
    """Add the LoRA adapter that the arguments ask for, if any.

    Raises:
        Refused: the adapter does not fit, or the model cannot be trained.
    """
    if getattr(args, "lora_r", 0):
        modules, seed = args.lora_target_modules, getattr(args, "seed", 0)
        add_lora(policy, r=args.lora_r, alpha=args.lora_alpha, target_modules=modules, seed=seed)
    check_trainable(policy)


def make_accelerator(args: Any) -> Any:
    """Make accelerate's handle of device, precision and processes, as the arguments of a run say.

    Raises:
        Refused: accelerate refuses the settings.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    # accelerate remembers the device and the precision of the first run of a program; each run has its own.
    alone = (
        PartialState._shared_state.get("num_processes") == 1
    )  # else processes must not be joined again
    AcceleratorState._reset_state(reset_partial_state=alone)
    # Without a GPU accelerate joins the processes that torchrun has started only if it is told so.
    cpu = args.cpu or not torch.accelerator.is_available()
    # Accelerate would take the device of this variable even if it is told to take the CPU.
    hidden = [*overruled(), *["ACCELERATE_TORCH_DEVICE"] * (args.cpu is True)]
    values = {name: os.environ.pop(name) for name in hidden if name in os.environ}
    try:
        return Accelerator(cpu=cpu, mixed_precision="no")
    except ValueError as error:
        raise Refused(
            f"accelerate cannot be set up as asked: {' '.join(str(error).split())}"
        ) from error
    finally:
        os.environ.update(values)


def check_shares(args: Any, world: int) -> None:
    """Refuse settings with which a number of processes cannot share a step equally."""
    prompts = args.prompts_per_step
    if world > 1 and args.generator == "vllm":
        raise Refused(
            f"vllm samples in a run of one process, and this run has {world}: take transformers."
        )
    if prompts % world:
        down, up = prompts // world * world, (prompts // world + 1) * world
        valid = f"{down} or {up}" if down else up
        problem = f"prompts_per_step={prompts} cannot be shared equally by {world} processes"
        raise Refused(f"{problem}. Give {valid}.")


def overruled() -> list[str]:
    """Return the environment variables of accelerate by which it would compute otherwise than a run says."""
    names = [name for name in os.environ if name.startswith("ACCELERATE_")]
    return sorted(name for name in names if name.removeprefix("ACCELERATE_") not in HEEDED)


def engine_of(args: Any) -> Callable[[Policy, int | None], Generator]:
    """Return what starts the generator that the arguments name, of a policy and `sampling_batch_size`."""
    if args.generator == "vllm":
        return partial(VllmGenerator.start, cache=args.generator_cache)
    return TransformersGenerator if args.generator == "transformers" else args.generator


def provenance_of(
    policy: Any, rows: Mapping[str, Sequence[Any]], accelerator: Any = None
) -> Provenance:
    """Return the provenance of a run, before its first step; only a run of the same can continue it.

    Args:
        policy: the policy or the reward model, with the weights that it starts from.
        rows: all rows of data that decide what is learnt, in named parts.
        accelerator: accelerate's handle of device and processes; None for one process without it.
    """
    fingerprints = {
        "data": rows_fingerprint(rows),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "base model": fingerprint(policy.model),
    }
    where = policy.model if accelerator is None else accelerator
    return Provenance(fingerprints, getattr(where, "num_processes", 1), where.device.type)


def load_placed(name: str, *, dtype: str, trust_remote_code: bool) -> Policy:
    """Load a model and move it to the accelerator's device; without an accelerator that is the CPU."""
    policy = load_policy(name, dtype=dtype, trust_remote_code=trust_remote_code)
    policy.model.to(device_for(policy.size))
    check_scoring(policy, gradient=False)
    return policy
