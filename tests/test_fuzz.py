"""Random command lines: each trains, or is refused in one paragraph, whatever it says.

A failure names its case; `FUZZ=line:17 pytest -m slow tests/test_fuzz.py` repeats that one alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent / "language"))

from fuzz_values import flags
from safetensors.torch import load_file
from tiny_models import make_model, make_tokenizer

import tokenrl
from tokenrl.cli import COMMANDS, main

CASES, BLOCKS, SECONDS = 500, 10, 30
REPEATED = os.environ.get("FUZZ", "").partition(":")


@contextlib.contextmanager
def deadline(seconds: int):
    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def checked(kind: str, block: int, run) -> None:
    """Run the cases of a block; `run(rng, number)` returns what is wrong, or nothing."""
    wrong = []
    again = [int(REPEATED[2])] if (kind, block) == (REPEATED[0], 0) else []
    for number in again if REPEATED[0] else range(block, CASES, BLOCKS):
        try:
            with deadline(SECONDS):
                failure = run(random.Random(f"{kind} {number}"))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            line = [
                f"{frame.filename}:{frame.lineno}"
                for frame in frames
                if "/tokenrl/" in frame.filename
            ][-1:]
            failure = f"{type(error).__name__}: {error!s:.300} at {line}"
        if failure:
            wrong.append(f"FUZZ={kind}:{number}  {failure}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The directory of a random model of 10,000 weights, with a chat template."""
    path = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(path)
    make_tokenizer("chat").save_pretrained(path)
    return str(path)


def finite(model: torch.nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


TOY = "task=sort_digits eval_size=2"
BASES = {
    "train": f"{TOY} max_steps=1 prompts_per_step=2 num_generations=2 output_dir=run",
    "sft": f"{TOY} max_steps=1 output_dir=run",
    "reward-model": "data=pairs.jsonl max_steps=1 output_dir=run",
    "evaluate": f"{TOY} num_generations=2 max_completion_length=6",
    "sample": "max_completion_length=6",
    "control": "max_steps=1 num_envs=2 eval_episodes=2 max_episode_steps=9 output_dir=run",
    "advise": "episodes=3",
    "report": "",
    "lab exact": "estimators=rloo",
    "lab measure": f"{TOY} num_prompts=4 num_generations=2 prompts_per_step=2 probes=4",
}
"""Flags of each command with which it is done in a second."""


def command_line(rng: random.Random, tiny: str, done: str) -> tuple[str, list[str]]:
    """A command with its words, most of which could be meant."""
    name = rng.choice(list(BASES))
    words = [word.split("=") for word in BASES[name].split()]
    base = {
        key: value
        for key, value in words
        if key in ("output_dir", "estimators") or rng.random() < 0.97
    }
    if name not in ("control", "advise", "report", "lab exact"):
        base["model"] = tiny if rng.random() < 0.95 else "nowhere"
    if name == "advise":
        base |= rng.choice([{"env": "bandit"}, {"run": done}])
    if name == "control":
        base["env"] = rng.choice(
            ["bandit", "gridworld", "CartPole-v1", "Pendulum-v1", "Nothing-v0"]
        )
    argv = flags(rng, COMMANDS[name].arguments, base)
    if name == "report":
        argv += rng.choice(
            [[], [done], [done, done], [done, "run"], ["x" * 999], [done, "--output", "a/b"]]
        )
    return name, [*name.split(), *argv]


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_command_lines(block, tiny, tmp_path, monkeypatch):
    """None ends with a traceback, with exit code 0 and no model, or with weights that are not finite."""
    inside = tmp_path / "work" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    tokenrl.train_agent(
        env="bandit", max_steps=1, num_envs=2, eval_episodes=2, output_dir="done", quiet=True
    )
    pair = {"prompt": "a", "chosen": "the cat", "rejected": "the dog"}
    Path("pairs.jsonl").write_text(
        "".join(json.dumps(pair | {"prompt": p}) + "\n" for p in "abcdefgh")
    )

    def run(rng: random.Random) -> str:
        shutil.rmtree("run", ignore_errors=True)
        name, argv = command_line(rng, tiny, "done")
        out = io.TextIOWrapper(io.BytesIO(), "utf-8")
        error = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        monkeypatch.setattr("sys.stdin", io.StringIO("a\n/n 1\nb\n"))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                code = main(argv)
            except SystemExit as exit:  # --help
                return "" if not exit.code else f"exit code {exit.code}: {argv}"
            except BaseException as problem:
                problem.args = (f"{problem!s:.300} {argv}",)
                raise
        error.seek(0)
        errors = [line for line in error.read().splitlines() if line.startswith("tokenrl:")]
        if code not in (0, 1, 2) or (code and not errors):
            return f"exit code {code}, {errors}: {argv}"
        has_model = Path("run", "model").is_dir()
        if code == 0 and "output_dir" in BASES[name] and not has_model and "--check" not in argv:
            return f"exit code 0 without a model: {argv}"
        files = Path("run", "model").glob("*.safetensors") if has_model else ()
        weights = [tensor for file in files for tensor in load_file(file).values()]
        return (
            ""
            if all(bool(torch.isfinite(tensor).all()) for tensor in weights)
            else f"not finite: {argv}"
        )

    checked("line", block, run)
