"""Makes the policy that a training starts from: loaded, tiny, or the base model of a toy task.

The base model of a toy task is a tiny model that has learnt from demonstrations; it is kept for later runs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import string
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tokenrl.errors import Refused
from tokenrl.files import atomic_directory, writing
from tokenrl.language.policy.arguments import (
    TINY,
    LoadingArguments,
    ModelArguments,
)
from tokenrl.language.policy.copies import copied, uncompiled
from tokenrl.language.policy.model import (
    Policy,
    add_lora,
    enable_gradient_checkpointing,
    load_policy,
    wrap,
)
from tokenrl.language.policy.saving import save_policy
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.supervised.fit import fit
from tokenrl.language.tasks.task import PromptTask, own_task
from tokenrl.runs.threads import using_threads
from tokenrl.settings import check_seed

WRITTEN = f"{string.printable[:95]}\n"
"""What environments are taken to write, for the vocabulary of a tiny model: printable ASCII."""

MADE_BY = 4  # to raise when the weights of a warm start change, or what its checkpoints hold


def load_base(
    args: ModelArguments,
    task: Any,
    announce: Callable[[str], None] = print,
    *,
    weights: bool = True,
) -> Policy:
    """Load the policy that the arguments name (object, directory or hub name), else the task's base model.

    Args:
        args: the arguments.
        task: the task, which may have a model of its own.
        announce: prints a line for people.
        weights: False gives a policy on which settings can be decided, without the weights of a named model
            and without the warm start of the task's own.

    Raises:
        Refused: the model cannot be loaded, or cannot be asked as the arguments say.
    """
    source: Any = args.model
    if source == TINY and not os.path.isdir(TINY):
        policy = make_tiny(args, task)
    elif source is None and not weights:
        check_own_model(task)
        policy = wrap(*task.base.build(args.base_seed), source=f"{task.name} base")
    else:
        if source is None:
            source = str(warm_started_base(task, seed=args.base_seed, announce=announce))
        policy = policy_of(source, args, weights=weights)
    policy.ask(args.form)
    if args.gradient_checkpointing and weights:
        enable_gradient_checkpointing(policy)
    return policy


def policy_of(source: Any, args: LoadingArguments, *, weights: bool = True) -> Policy:
    """Return a policy as it is, make one of a pair (model, tokenizer), or load it by its name.

    Args:
        source: the policy, the pair or the name.
        args: how a named model is loaded.
        weights: whether the weights of a named model are loaded.

    Raises:
        Refused: the model cannot be loaded.
    """
    if isinstance(source, Policy):
        source.model = uncompiled(source.model)
        return source
    if isinstance(source, tuple | list):
        return wrap(*source, source=type(source[0]).__name__)
    trust = args.trust_remote_code
    return load_policy(source, dtype=args.dtype, trust_remote_code=trust, weights=weights)


def with_own_weights(policy: Policy, source: Any) -> Policy:
    """Return the policy of a source; a model that the caller holds is copied, so that it stays as it is."""
    if isinstance(source, str | None):
        return policy
    return replace(policy, model=copied(policy.model))


def make_tiny(args: ModelArguments, task: PromptTask) -> Policy:
    """Make a tiny model with random weights: that of a toy task before its warm start, or one for any rows.

    Args:
        args: the arguments of a command; the weights depend on the vocabulary and on `base_seed` alone.
        task: the task; held-out rows and demonstrations count for the vocabulary too.
    """
    if task.base:
        build = task.base.build
    else:
        rows: list[Any] = [*task.train_prompts, *task.eval_prompts, *task.demonstrations]
        environment = task.environment
        template = getattr(args, "teacher_template", None)
        calls = any(row.get("tools") and not isinstance(row["prompt"], str) for row in rows)
        if environment is not None or calls:
            rows.append({"prompt": WRITTEN})
        limit = getattr(args, "max_completion_length", None) or task.max_completion_length
        build = partial(
            importlib.import_module("toy_tasks.models").model_for_rows,
            rows,
            texts=(args.system_prompt or "", template or "", *(args.stop or ())),
            chat=bool(args.chat),
            tools=calls or (environment and Environments(environment).has_tools),
            room=max(1024, limit or 0),
        )
    policy = wrap(*build(args.base_seed), source=TINY)
    policy.model.to(getattr(torch, args.dtype.replace("auto", "float32")))
    return policy


def vocabulary_of(policy: Policy) -> str:
    """Return the size of the vocabulary of a new tiny model, for the header; nothing of other models."""
    is_new = policy.source == TINY
    return f", a vocabulary of {len(policy.tokenizer):,} tokens" if is_new else ""


def adapt(args: Any, policy: Policy) -> None:
    """Add the LoRA adapter that the arguments ask for, if any; check that there are weights that can be trained.

    Raises:
        Refused: the adapter does not fit, no parameter requires a gradient, or one that does is float16.
    """
    if args.lora_r:
        add_lora(
            policy,
            r=args.lora_r,
            alpha=args.lora_alpha,
            target_modules=args.lora_target_modules,
            seed=args.seed,
        )
    trained = policy.trainable_parameters()
    if any(p.dtype == torch.float16 for p in trained):
        raise Refused(
            f"{policy.source!r} is float16: gradients underflow. Use bfloat16 or float32."
        )
    if not trained:
        raise Refused(
            f"{policy.source!r} has no trainable parameter: set requires_grad, or use LoRA."
        )


def warm_started_base(
    task: Any, *, seed: int = 0, announce: Callable[[str], None] = lambda text: None
) -> Path:
    """Make the tiny model of a toy task, warm-started on its demonstrations, unless it is there already.

    It lies in $TOKENRL_CACHE, or else in tokenrl/ of the user's cache, under a name that changes with the task.

    Args:
        task: a task as `load_task` takes it, with `build(seed)`, `demonstrations`, `warm_start` and
            `fingerprint`.
        seed: seed of the initial weights and of the order of demonstrations.
        announce: prints a line for people, since making the model takes some seconds.

    Returns:
        The directory of model and tokenizer.

    Raises:
        Refused: the task has no model of its own, or the seed has more than 32 bits.
        Stopped: the directory cannot be written.
    """
    task = own_task(task)
    check_own_model(task)
    check_seed(seed)
    base = task.base
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("TOKENRL_CACHE") or Path(home) / "tokenrl")
    ingredients = [base.fingerprint, seed, torch.__version__.split("+")[0], MADE_BY]
    digest = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()
    folder = cache / f"{task.name}-{digest[:16]}"
    if folder.exists():
        return folder
    # One thread, for the same weights on every machine; runs that start together make it once.
    with writing(cache), using_threads(1):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                with atomic_directory(folder) as new:
                    policy = wrap(*base.build(seed), source=f"{task.name} base")
                    if warm := base.warm_start:
                        rows = base.demonstrations
                        words = f"on {len(rows)} demonstrations ({warm.steps} steps)"
                        announce(f"Warm-starting a tiny model {words}.")
                        sizes = {"max_steps": warm.steps, "batch_size": warm.batch_size}
                        fit(policy, rows, **sizes, learning_rate=warm.learning_rate, seed=seed)
                    save_policy(policy, new)
    return folder


def check_own_model(task: PromptTask) -> None:
    """Refuse a task without a model of its own, where no other model is named."""
    if not task.base:
        mend = "name one by model (--model), a directory or hub name, or tiny for a new one"
        raise Refused(f"The task {task.name!r} has no model of its own: {mend}.")
