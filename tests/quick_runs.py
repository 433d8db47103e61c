"""What the tests of a quick run need not do twice, and where the disk is not waited for.

The slow runs and the processes that tests start do everything each time.
"""

from __future__ import annotations

import copy
import os
import sys
from functools import cache, wraps
from hashlib import sha256
from itertools import chain

import pytest

import toy_tasks


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Change the modules that the tests have imported, until the patch is undone."""
    patch.setattr(os, "fsync", lambda handle: None)
    patch.setattr(toy_tasks, "load", cached_tasks(toy_tasks.load))
    if "tokenrl.flags" in sys.modules:
        flags = sys.modules["tokenrl.flags"]
        patch.setattr(flags, "parse_from_object", cache(flags.parse_from_object))
    if "tokenrl.language.rollout.forward" in sys.modules:
        forward = sys.modules["tokenrl.language.rollout.forward"]
        patch.setattr(forward, "check_model", remembered(forward.check_model))
    if "tokenrl.language.policy.saved" in sys.modules:
        saved = sys.modules["tokenrl.language.policy.saved"]
        patch.setattr(saved.SavedModel, "check", trial_once(saved.SavedModel.check))


def cached_tasks(load):
    """Toy tasks whose rows are made once, and copied for each test that may change them."""
    load_once = cache(load)

    @wraps(load)
    def copied(name, **options):
        task = copy.copy(load_once(name, **options))
        for field, value in vars(task).items():
            if isinstance(value, list | dict):
                object.__setattr__(task, field, copy.copy(value))
            if isinstance(value, list):
                vars(task)[field][:] = map(dict, value)
        return task

    return copied


def remembered(check_model):
    """The check before a run, made once for the same bits of a model and the same code.

    It takes longer than a step of a tiny model. Its own tests call it by its own name.
    """
    results = {}

    @wraps(check_model)
    def check(policy, model=None, *, accelerator=None, **options):
        together = accelerator is not None and accelerator.num_processes > 1
        if together or policy.device.type != "cpu":
            return check_model(policy, model, accelerator=accelerator, **options)
        models = [policy.model, *([] if model in (None, policy.model) else [model])]
        of = (*map(_state, models), *_code(), policy.context, *sorted(options.items()))
        if of not in results:
            results[of] = check_model(policy, model, accelerator=accelerator, **options)
        return results[of]

    return check


def trial_once(check):
    """The trial of saving, made once for the same bits of a model with an equal tokenizer."""
    passed = set()

    @wraps(check)
    def once(self, folder):
        policy, model = self.policy, self.policy.model
        tokenizer, settings = policy.tokenizer, getattr(model, "generation_config", None)
        vocabulary = sorted(tokenizer.get_vocab().items())  # else its order is another each time
        ends = getattr(policy, "eos_ids", ()), vocabulary, tokenizer.chat_template
        key = (
            self.kind,
            _state(model),
            type(tokenizer),
            str(ends),
            settings and settings.to_json_string(),
        )
        if key not in passed:
            check(self, folder)
            passed.add(key)

    return once


def _code():
    """The functions that the check uses, of which a test may have put others in their place."""
    from tokenrl.language.rollout import agreement, cache

    return agreement.TransformersGenerator.generate, agreement.score, cache.Memory.update


def _state(model):
    """All that decides what a model computes, as a key."""
    import torch

    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = []
    for name, m in model.named_modules():
        switches = m.training, getattr(m, "gradient_checkpointing", None)
        code = type(m), type(m).forward, m.__dict__.get("forward")
        modules.append((name, *code, *switches, *(len(getattr(m, hook)) for hook in hooks)))
    tensors = []
    for name, x in chain(model.named_parameters(), model.named_buffers()):
        bits = sha256(x.detach().flatten().view(torch.uint8).numpy()).digest()
        tensors.append((name, x.dtype, x.shape, x.requires_grad, bits))
    return (
        tuple(modules),
        tuple(tensors),
        model.config.to_json_string(),
        model.config._attn_implementation,
    )
