"""Random command lines: each trains, or is refused in one paragraph, whatever it says.

A failure shows the words of its case.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent / "language"))

from fuzz_values import flags
from safetensors.torch import load_file
from tiny_models import make_model, make_tokenizer

import tokenrl
from tokenrl.cli import COMMANDS, main

CASES, BLOCKS, SECONDS = 500, 10, 30


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The directory of a random model of 10,000 weights, with a chat template."""
    path = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(path)
    make_tokenizer("chat").save_pretrained(path)
    return str(path)


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

    for number in range(block, CASES, BLOCKS):
        shutil.rmtree("run", ignore_errors=True)
        name, argv = command_line(random.Random(f"line {number}"), tiny, "done")
        print(argv)  # shown where it fails
        out = io.TextIOWrapper(io.BytesIO(), "utf-8")
        error = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        monkeypatch.setattr("sys.stdin", io.StringIO("a\n/n 1\nb\n"))
        with (
            deadline(SECONDS),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(error),
            contextlib.suppress(SystemExit),  # --help
        ):
            code = main(argv)
            error.seek(0)
            refused = any(line.startswith("tokenrl:") for line in error.read().splitlines())
            assert code in (0, 1, 2) and (code == 0 or refused), (code, argv)
            model = Path("run", "model")
            if code == 0 and "output_dir" in BASES[name] and "--check" not in argv:
                assert model.is_dir(), argv
            for file in model.glob("*.safetensors"):
                weights = load_file(file).values()
                assert all(tensor.isfinite().all() for tensor in weights), argv
