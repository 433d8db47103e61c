"""Draws random settings for the fuzzer: allowed ones, ones at the bounds, and ones beyond all reason."""

from __future__ import annotations

import math
import random
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.settings import Bounds, field_types

SMALL: dict[str, Any] = {
    **dict.fromkeys(("max_steps", "num_iterations", "warm_start_steps"), (1, 2)),
    **dict.fromkeys(("prompts_per_step", "num_generations"), (1, 2, 3, 4)),
    **dict.fromkeys(("eval_generations", "value_iterations", "lora_r"), (0, 1, 2)),
    **dict.fromkeys(("micro_batch_size", "rows_at_once"), (None, 1, 3, 10**9)),
    **dict.fromkeys(("num_envs", "batch_size"), (1, 2, 5)),
    "max_completion_length": [1, 2, 6, 20, 64],
    **{"eval_size": [1, 2, 10**9], "num_minibatches": [1, 2, 3]},
    **{"max_refills": [0, 1, 3], "num_steps": [None, 2, 7], "max_episode_steps": [None, 1, 5]},
    **{
        "eval_episodes": [1, 3],
        "hidden": [(), (1,), (4, 3)],
        "num_pairs": [4, 20],
        "num_prompts": [1, 4, 8],
    },
    **{"num_samples": [2, 4], "episodes": [2, 3], "best_of": [0, 2, 3], "k": [(), (1,), (1, 2)]},
    **{"probes": [2, 8], "hidden_size": [None, 16, 7], "threads": [None, 1]},
    "temperature": [1.0, 0.3, 1e-30, 1e30],
    **dict.fromkeys(("video", "trust_remote_code"), (False,)),
    "reward_timeout": [None],  # a process of its own takes seconds to start
}
"""Settings whose allowed values could take for ever, or fill the memory; a few that take neither."""
TEXTS = ("", "x", "prompt", "../up", "é\x00", "x" * 999, "\ud800", "{a", "none", "--seed")
ODD = (
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    10**10,
    2**63,
    10**400,
    1e31,
    1e-45,
    -1e30,
    1.5,
    True,
    None,
)
WRONG = ("x", "", [], [1], {}, {"a": 1}, b"x", (math.nan,), (None, 1))


def allowed(rng: random.Random, name: str, hint: Any) -> Any:
    """A value that the type of a setting allows, often at a bound."""
    if name in SMALL:
        return rng.choice(SMALL[name])
    metadata = getattr(hint, "__metadata__", ())
    hint = get_args(hint)[0] if metadata else hint
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return allowed(rng, "", rng.choice(parts))
    if get_origin(hint) is Literal:
        return rng.choice(parts)
    if get_origin(hint) is tuple:
        length = rng.randrange(3) if parts[-1] is Ellipsis else len(parts)
        return tuple(allowed(rng, "", parts[0]) for _ in range(length))
    if hint is Estimator:
        return estimator(rng)
    if hint in (int, float):
        return number(rng, hint, next((m for m in metadata if isinstance(m, Bounds)), Bounds()))
    return {bool: rng.random() < 0.5, NoneType: None}.get(hint, rng.choice(TEXTS))


def number(rng: random.Random, kind: type, bounds: Bounds) -> Any:
    """A number within bounds: one of them, or one between."""
    limits = [
        b for b in (bounds.at_least, bounds.above, bounds.at_most, bounds.below) if b is not None
    ]
    usual = [0, 1, 2, 3, 7] if kind is int else [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0, 2.0, 10.0]
    return kind(rng.choice([x for x in (*usual * 3, *limits) if bounds.hold(x)]))


def estimator(rng: random.Random, odd: float = 0.1) -> dict[str, Any]:
    """Axes of a preset, some of them changed, as a mapping."""
    axes = dict(vars(Estimator.preset(rng.choice(list(PRESETS)))))
    for name, hint in rng.sample(list(field_types(Estimator).items()), rng.randrange(6)):
        axes[name] = spoilt(rng) if rng.random() < odd else allowed(rng, name, hint)
    return axes


def spoilt(rng: random.Random) -> Any:
    """A value that few settings allow."""
    return rng.choice(ODD if rng.random() < 0.6 else WRONG)


def drawn(rng: random.Random, kind: type, fixed: dict[str, Any]) -> dict[str, Any]:
    """Random settings: in half of the cases all are allowed by their types, else one in five is odd."""
    odd = rng.choice([0.0, 0.2])
    hints = {name: hint for name, hint in field_types(kind).items() if name not in fixed}
    chosen = rng.sample(list(hints), rng.randrange(1, min(len(hints), 14)))
    settings = {n: spoilt(rng) if rng.random() < odd else allowed(rng, n, hints[n]) for n in chosen}
    if "estimator" in hints and rng.random() < 0.5:
        settings["estimator"] = estimator(rng, odd / 2)
    return settings | fixed


def flags(rng: random.Random, kind: type, base: dict[str, str]) -> list[str]:
    """Random flags of a command, which may replace those of `base`."""
    settings = drawn(rng, kind, {})
    for name in ("estimator", "run_dir"):  # no flags, or not of this form
        settings.pop(name, None)
    words = {
        f"--{name.replace('_', '-')}": value for name, value in settings.items() if name not in base
    }
    argv = [
        word
        for flag, value in base.items()
        for word in (f"--{flag.replace('_', '-')}", *value.split())
    ]
    if "estimator" in field_types(kind) and rng.random() < 0.5:
        for name, value in rng.sample(list(estimator(rng).items()), 2):
            words[f"--estimator.{name.replace('_', '-')}"] = value
        words["--estimator"] = rng.choice([*PRESETS, "nonsense"]) if rng.random() < 0.7 else None
    for flag, value in words.items():
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            several = value if isinstance(value, (tuple, list)) else [value]
            argv += [flag, *("1" + "0" * 400 if item == 10**400 else str(item) for item in several)]
    if rng.random() < 0.05:
        argv.append(rng.choice(["--", "-x", "extra", "--nonsense", ""]))
    # as a shell can give
    return [word.replace("\x00", "").replace("\ud800", "\udcff") for word in argv]
