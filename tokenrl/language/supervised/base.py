"""Makes the policy that a training starts from: loaded, tiny, or the base model of a toy task."""

from __future__ import annotations

import importlib
import os
import string
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tokenrl.language.policy.arguments import TINY, LoraArguments, ModelArguments
from tokenrl.language.policy.loading import device_for
from tokenrl.language.policy.model import (
    Policy,
    add_lora,
    enable_gradient_checkpointing,
    load_policy,
    wrap,
)
from tokenrl.language.policy.prompts import fill_form, form_of
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rollout.agreement import check_scoring
from tokenrl.language.supervised.fit import check_trainable
from tokenrl.language.supervised.warm_start import warm_started_base

WRITTEN = f"{string.printable[:95]}\n"
"""What environments are taken to write, for the vocabulary of a tiny model: printable ASCII."""


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


def make_tiny(args: ModelArguments, task: Any) -> Policy:
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


def adapt(args: ModelArguments, policy: Policy) -> None:
    """Add the LoRA adapter that the arguments ask for, if any.

    Raises:
        Refused: the adapter does not fit, or the model cannot be trained.
    """
    if isinstance(args, LoraArguments) and args.lora_r:
        add_lora(
            policy,
            r=args.lora_r,
            alpha=args.lora_alpha,
            target_modules=args.lora_target_modules,
            seed=getattr(args, "seed", 0),
        )
    check_trainable(policy)


def load_placed(name: str, *, dtype: str, trust_remote_code: bool) -> Policy:
    """Load a model and move it to the accelerator's device; without an accelerator that is the CPU."""
    policy = load_policy(name, dtype=dtype, trust_remote_code=trust_remote_code)
    policy.model.to(device_for(policy.size))
    check_scoring(policy, gradient=False)
    return policy
