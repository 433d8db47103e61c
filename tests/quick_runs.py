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
        read_flags_once(patch, sys.modules["tokenrl.flags"])
    if "tokenrl.language.rollout.forward" in sys.modules:
        forward = sys.modules["tokenrl.language.rollout.forward"]
        patch.setattr(forward, "check_model", remembered(forward.check_model))
    if "tokenrl.language.policy.saved" in sys.modules:
        saved = sys.modules["tokenrl.language.policy.saved"]
        patch.setattr(saved.SavedModel, "check", trial_once(saved.SavedModel.check))


def read_flags_once(patch: pytest.MonkeyPatch, flags) -> None:
    """The texts of all flags, and the parser made of them, which takes longer than to read a command line."""
    parsers, make, types, parsers_of_types = flags.tyro._parsers, flags._flags, {}, {}
    make_parser = parsers.ParserSpecification.from_callable_or_type

    def of_command(command, start=None):
        if start is not None:  # for the help, which other rules make
            return make(command, start)
        key = command.arguments, command.trains
        types[key] = types.get(key) or make(command)
        return types[key]

    def of_type(kind, *args, **options):
        if not any(kind is kind for kind in types.values()):
            return make_parser(kind, *args, **options)
        key = id(kind), repr(args), repr(sorted(options.items()))
        parsers_of_types[key] = parsers_of_types.get(key) or make_parser(kind, *args, **options)
        return parsers_of_types[key]

    patch.setattr(flags, "parse_from_object", cache(flags.parse_from_object))
    patch.setattr(flags, "_flags", of_command)
    patch.setattr(parsers.ParserSpecification, "from_callable_or_type", staticmethod(of_type))


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
        states = (_state(policy.model), model and _state(model), *_code(), policy.context)
        key = (*states, *sorted(options.items()))
        if together or policy.device.type != "cpu" or key not in results:
            results[key] = check_model(policy, model, accelerator=accelerator, **options)
        return results[key]

    return check


def trial_once(check):
    """The trial of saving, made once for the same bits of a model with an equal tokenizer."""
    passed = set()

    @wraps(check)
    def once(self, folder):
        policy, tokenizer = self.policy, self.policy.tokenizer
        vocabulary = sorted(tokenizer.get_vocab().items())  # else its order is another each time
        settings = str(getattr(policy.model, "generation_config", None))
        ends = str((getattr(policy, "eos_ids", ()), vocabulary, tokenizer.chat_template))
        key = self.kind, type(tokenizer), ends, settings, _state(policy.model)
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
