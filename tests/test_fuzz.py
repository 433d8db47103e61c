"""Random command lines of allowed values: each trains, or is refused in one paragraph.

What a type does not allow is in `test_settings.py`, for each field; here settings meet each other.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from folders import write_rows
from safetensors.torch import load_file
from test_settings import leaves

from tokenrl.cli import COMMANDS, main
from tokenrl.core import PRESETS, Estimator
from tokenrl.settings import field_types

TOY = "--task sort_digits --model tiny --eval-size 2"
BASES = {
    "train": f"{TOY} --max-steps 1 --prompts-per-step 2 --num-generations 2",
    "sft": f"{TOY} --max-steps 1",
    "reward-model": "--data pairs.jsonl --model tiny --max-steps 1",
    "control": "--env bandit --max-steps 1 --num-envs 2 --eval-episodes 2 --max-episode-steps 9",
    "evaluate": "--model tiny --task sort_digits --eval-size 2 --num-generations 2",
    "lab measure": f"{TOY} --num-prompts 4 --num-generations 2 --prompts-per-step 2 --probes 4",
}
"""Flags of each command with which it is done in a second."""
NOT_DRAWN = {"estimator", "config", "output_dir", "reward_timeout", "video", "trust_remote_code"}
LARGEST = 64
"""What sizes are drawn up to, so that a case takes neither minutes nor the memory."""


def allowed(rng: random.Random, hint: Any) -> Any:
    """A value that the type of a setting allows, often at a bound."""
    kind, bounds = rng.choice(leaves(hint))
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if kind in (int, float):
        usual = (0, 1, 2, 7) if kind is int else (0.0, 1e-3, 0.5, 0.9, 1.0, 10.0)
        limits = [x for x in bounds.limits().values() if kind is float or x < LARGEST]
        return kind(rng.choice([x for x in (*usual, *limits) if bounds.hold(x)]))
    return {str: rng.choice(("", "x", "a" * 999, "{a", "none")), bool: True}.get(kind)


def flags(rng: random.Random, name: str) -> Iterator[str]:
    """Flags of a command, some of them those of the estimator."""
    hints = {n: h for n, h in field_types(COMMANDS[name].arguments).items() if n not in NOT_DRAWN}
    chosen = {n: allowed(rng, hints[n]) for n in rng.sample(list(hints), rng.randrange(1, 9))}
    if name in ("train", "control"):
        yield from ("--estimator", rng.choice(list(PRESETS)))
        axes = rng.sample(list(field_types(Estimator).items()), rng.randrange(4))
        chosen |= {f"estimator.{axis}": allowed(rng, hint) for axis, hint in axes}
    for setting, value in chosen.items():
        flag = setting.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{rng.choice(('', 'no-'))}{flag}"
        elif value is not None:
            yield f"--{flag}={value}"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(120))
def test_random_command_lines(number, workplace, monkeypatch):
    """None ends with a traceback, with exit code 0 and no model, or with weights that are not finite."""
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    pairs = [{"prompt": x, "chosen": "the cat", "rejected": "the dog"} for x in "abcdefgh"]
    write_rows("pairs.jsonl", pairs)
    rng = random.Random(number)
    name = rng.choice(list(BASES))
    argv = [*name.split(), *BASES[name].split(), *flags(rng, name)]
    trains = COMMANDS[name].trains
    argv += ["--output-dir", "run"] * trains
    with contextlib.redirect_stderr(io.StringIO()) as error:
        code = main(argv)
    told = [line for line in error.getvalue().splitlines() if line.startswith("tokenrl:")]
    assert code in (0, 1, 2) and (told or not code), argv
    has_model = Path("run", "model").is_dir()
    assert code or has_model == (trains and "--check" not in argv), argv
    for file in Path("run").glob("model/*.safetensors"):
        assert all(bool(torch.isfinite(x).all()) for x in load_file(file).values()), argv
