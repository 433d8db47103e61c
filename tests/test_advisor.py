"""The advisor: what it measures, what follows from it, what it refuses, and that its files can be run."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest

from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.advisor.environment import advise_environment, choose, fitted
from tokenrl.advisor.environment_reasons import Returns, doubts
from tokenrl.advisor.language import (
    completion_length,
    difficulty,
    doubts as language_doubts,
    facts,
    fitted as language_fitted,
    group_size,
)
from tokenrl.advisor.show import Advice, command_line, written
from tokenrl.cli import COMMANDS, main
from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Spec
from tokenrl.core import Estimator
from tokenrl.flags import parse
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.probe import Estimate, Probe
from tokenrl.language.training.setup import resolve
from tokenrl.settings import arguments

CARTPOLE = Spec("CartPole-v1", 4, 2, 0, 500, 475.0, fast=True)
LANDER = Spec("LunarLander-v3", 8, 4, 0, 1000, 200.0, fast=False)
PENDULUM = Spec("Pendulum-v1", 3, None, 1, 200, None, fast=False)
ORDINARY = Returns(episodes=40, mean=20.0, sd=10.0, length=20.0, unusual=0.9, truncated=0.0)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parsed(line: str):
    """The arguments that a command line stands for."""
    name, *argv = line.split()[1:]
    return parse(name, COMMANDS[name], argv)


@pytest.mark.parametrize(
    "spec, baseline, way",
    [
        (CARTPOLE, None, "episodes"),
        (replace(CARTPOLE, horizon=501), None, "critic"),
        (replace(CARTPOLE, fast=False), None, "critic"),
        (replace(CARTPOLE, fast=False, horizon=100), None, "episodes"),
        (CARTPOLE, "value", "critic_episodes"),
        (replace(CARTPOLE, fast=False), "value", "critic"),
        (LANDER, "value", "critic"),
        (PENDULUM, "value", "continuous"),
        (LANDER, None, "critic"),
        (LANDER, "running_mean", "episodes"),
        (PENDULUM, None, "continuous"),
    ],
)
def test_the_way_follows_from_horizon_speed_and_actions(spec, baseline, way):
    assert choose(spec, baseline) == way


def test_returns_decide_scale_bonus_and_environments():
    whole = ControlArguments(num_envs=64)
    found = fitted(whole, CARTPOLE, ORDINARY)
    assert (found.estimator.entropy_coef, found.reward_scale, found.num_envs) == (0.1, 1.0, 64)
    critic = ControlArguments(estimator=Estimator.preset("ppo"), num_envs=16, num_steps=128)
    found = fitted(critic, LANDER, replace(ORDINARY, sd=122.0))
    assert (found.estimator.entropy_coef, found.reward_scale, found.num_envs) == (0.01, 0.008, 16)
    assert fitted(critic, LANDER, replace(ORDINARY, unusual=0.05)).num_envs == 32
    endless = fitted(critic, PENDULUM, replace(ORDINARY, truncated=1.0))
    assert endless.estimator.entropy_coef == 0 and endless.estimator.gamma == 0.95


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, ""),
        ({"sd": 0.0, "unusual": 0.0}, "no signal"),
        ({"unusual": 0.05}, "sparse"),
        ({"mean": 480.0}, "already reaches"),
    ],
)
def test_what_returns_give_to_doubt(changes, words):
    said = " ".join(doubts(CARTPOLE, replace(ORDINARY, **changes)))
    assert words in said and bool(words) == bool(said)


def test_an_environment_is_measured_and_the_files_can_be_run(tmp_path, capsys):
    assert main(["advise", "--env", "CartPole-v1", "--config", "c.json", "--json", "a.json"]) == 0
    shown = capsys.readouterr().out
    assert "timestep_mean" in shown and "tokenrl control --config c.json" in shown
    advice = json.loads((tmp_path / "a.json").read_text())
    heads = {head["name"]: head["parameters"] for head in advice["heads"]}
    assert heads == {"softmax": 4 * 64 + 64 + 64 * 2 + 2, "gaussian": None}
    returns = advice["measurements"]["returns"]
    # Random play of CartPole lasts about 22 steps and pays 1 a step; 40 episodes give a standard error of 2.
    assert returns["mean"] == pytest.approx(returns["length"]) and 14 < returns["mean"] < 32
    assert parsed("tokenrl control --config c.json") == parsed(shown_command(advice))
    arguments = parsed("tokenrl control --config c.json")
    assert arguments.estimator.baseline == "timestep_mean" and arguments.head == "softmax"
    assert main(["control", "--config", "c.json", "--eval-episodes", "2", "--check", "--quiet"]) == 0
    assert main(["train", "--config", "c.json"]) == 2
    assert "is for `tokenrl control`" in capsys.readouterr().err


def shown_command(record: dict) -> str:
    return command_line(Advice("", "control", arguments(ControlArguments, record["arguments"]), {}, [], {}))


@pytest.mark.parametrize(
    "arguments",
    [
        ControlArguments(),
        ControlArguments(env="Pendulum-v1", hidden=(128, 128), normalize_observations=True, num_steps=128,
                         estimator=Estimator.preset("ppo", gamma=0.99, value_clip=None)),
        TrainArguments(task="addition", num_generations=4, learning_rate=2e-4, prompt_template="a b {x}",
                       estimator=Estimator(baseline="running_mean", leave_one_out=False, beta=0.05)),
    ],
)  # fmt: skip
def test_the_command_shown_has_the_advised_arguments(arguments):

    name = "control" if isinstance(arguments, ControlArguments) else "train"
    line = shlex.split(command_line(Advice("", name, arguments, {}, [], {})))
    assert parse(name, COMMANDS[name], line[2:]) == arguments


def test_a_gaussian_head_has_twice_the_outputs():
    advice = advise_environment(AdviseArguments(env="Pendulum-v1", episodes=2))
    heads = {head.name: head.parameters for head in advice.heads}
    assert heads == {"gaussian": 3 * 128 + 128 + 128 * 128 + 128 + 2 * (128 + 1), "softmax": None}
    assert advice.arguments.head == "gaussian" and advice.arguments.num_steps is not None
    assert advice.arguments.estimator.gamma == 0.95  # no episode of Pendulum ends by itself
    names = [setting.name for setting in advice.settings]
    assert {"estimator.baseline", "reward_scale", "num_iterations"} <= set(names)


LONG = ["--env", "CartPole-v1", "--max-episode-steps", "501", "--episodes", "2"]


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "--env ID for control"),
        (["--env", "CartPole-v1", "--task", "vowels"], "--env ID for control"),
        (["--task", "vowels", "--run", "runs/a"], "one of three"),
        (["--env", "CartPole-v7"], "CartPole-v7"),
        (["--env", "Pendulum-v1", "--head", "softmax"], "head 'softmax'"),
        (["--env", "CartPole-v1", "--head", "gaussian"], "head 'gaussian'"),
        (["--task", "vowels", "--head", "gaussian"], "head 'gaussian'"),
        ([*LONG, "--baseline", "none"], "--allow-no-baseline"),
        ([*LONG, "--baseline", "remax"], "baseline was given as 'remax'; it must be one of"),
        (["--env", "CartPole-v1", "--config", "nowhere/c.json"], "nowhere/c.json"),
        (["--env", "CartPole-v1", "--episodes", "1"], "at least 2"),
        (["--task", "vowels", "--baseline", "none", "--max-completion-length", "501"], "--allow-no-baseline"),
    ],
)
def test_refusals_are_one_paragraph_and_exit_code_2(argv, words, capsys):
    assert main(["advise", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_no_baseline_passes_with_a_warning_where_it_is_allowed(capsys):
    assert main(["advise", *LONG, "--baseline", "none", "--allow-no-baseline", "--config", "c.json"]) == 0
    assert "allowed by --allow-no-baseline" in capsys.readouterr().out
    arguments = parsed("tokenrl control --config c.json")
    assert arguments.allow_no_baseline and arguments.estimator.baseline == "none"
    assert main(["advise", *LONG[:2], "--episodes", "2", "--baseline", "none"]) == 0  # 500 steps are short
    assert "allowed by" not in capsys.readouterr().out


def probe(reward=0.25, dead=(0.6, 0.4, 0.2), cut=0.0, entropy=0.5, binary=True) -> Probe:
    shares = {size: Estimate(share, 0.01) for size, share in zip((2, 4, 8), dead, strict=True)}
    one = Estimate(reward, 0.02)
    passed = {1: one} if binary else {}
    return Probe(64, 8, binary, one, {1: one}, shares, Estimate(cut, 0.01), 7.0, 8, entropy, passed=passed)


@pytest.mark.parametrize(
    "dead, size", [((0.6, 0.4, 0.2), 4), ((0.7, 0.6, 0.5), 8), ((0.9, 0.8, 0.6), 8), ((0.0, 0.0, 0.0), 4)]
)
def test_the_smallest_group_of_which_half_live(dead, size):
    assert group_size(probe(dead=dead)) == size
    train = resolve(TrainArguments(prompts_per_step=16, max_completion_length=8), task=None)
    found, settings = language_fitted(train, probe(dead=dead), None, reward_model=False)
    assert (found.num_generations, found.prompts_per_step) == (size, 128 // size)
    said = {setting.name: setting.reason for setting in settings}["num_generations"]
    assert ("the largest measured" in said) == (dead[-1] > 0.5)


@pytest.mark.parametrize(
    "found, solved, verdict",
    [
        (probe(), 0.95, "fine"),
        (probe(reward=0.96), None, "too easy"),
        (probe(reward=0.96, binary=False), None, "fine"),
        (probe(reward=-0.04, binary=False), -0.05, "too easy"),
        (probe(reward=0.01, dead=(0.98, 0.95, 0.91)), 0.95, "too hard"),
        (probe(reward=0.01, dead=(0.98, 0.95, 0.90)), 0.95, "fine"),
    ],
)
def test_difficulty(found, solved, verdict):
    assert difficulty(found, solved) == verdict
    said = " ".join(language_doubts(found, solved, resolve(TrainArguments(), task=None)))
    assert (verdict in said) == (verdict != "fine")


def test_pass_at_k_is_shown_where_the_reward_says_what_is_right():
    declared, silent = facts(probe(), None), facts(probe(binary=False), None)
    assert declared["pass@1"].startswith("0.250") and "mean reward" not in declared
    assert silent["mean reward"].startswith("0.250") and "pass@1" not in silent
    marked = facts(replace(probe(binary=False), passed={1: Estimate(0.96, 0.02)}), None)
    assert (marked["mean reward"][:5], marked["pass@1"][:5], marked["difficulty"]) == (
        "0.250",
        "0.960",
        "too easy",
    )


@pytest.mark.parametrize("cut, room, length", [(0.05, None, 8), (0.2, None, 16), (0.2, 12, 12), (0.2, 8, 8)])
def test_many_cut_completions_ask_for_a_longer_limit(cut, room, length):
    assert completion_length(8, probe(cut=cut), room)[0] == length


def test_a_reward_model_gets_a_kl_and_a_certain_policy_an_entropy_bonus():
    train = resolve(TrainArguments(prompts_per_step=16, max_completion_length=8), task=None)
    plain, _ = language_fitted(train, probe(), None, reward_model=False)
    assert (plain.estimator.beta, plain.estimator.entropy_coef) == (0, 0)
    judged, _ = language_fitted(train, probe(entropy=0.05), None, reward_model=True)
    assert (judged.estimator.beta, judged.estimator.entropy_coef) == (0.05, 0.01)


@pytest.mark.parametrize("subject", [["--task", "vowels"], ["--env", "bandit"]])
def test_the_command_line_that_is_shown_can_be_typed(subject, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    few = ["--num-prompts", "4", "--num-samples", "2"] if subject[0] == "--task" else []
    assert main(["advise", *subject, *few]) == 0
    line = capsys.readouterr().out.partition("Run it: ")[2].splitlines()[0]
    assert line.startswith("tokenrl ")
    assert main([*shlex.split(line)[1:], "--check", "--quiet", "--output-dir", "run"]) == 0


def test_a_task_is_measured_and_the_files_can_be_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    few = ["--num-prompts", "8", "--num-samples", "4", "--config", "c.json", "--json", "a.json"]
    assert main(["advise", "--task", "vowels", *few]) == 0
    shown = capsys.readouterr().out
    assert "dead groups" in shown and "rloo" in shown and "tokenrl train --config c.json" in shown
    advice = json.loads((tmp_path / "a.json").read_text())
    found = advice["measurements"]["probe"]
    assert (found["prompts"], found["samples"]) == (8, 4) and advice["arguments"]["task"] == "vowels"
    arguments = parsed("tokenrl train --config c.json")
    assert arguments.num_generations == advice["arguments"]["num_generations"]
    assert main(["train", "--config", "c.json", "--eval-generations", "0", "--check", "--quiet"]) == 0
    assert main(["control", "--config", "c.json"]) == 2
    assert "is for `tokenrl train`" in capsys.readouterr().err


def test_an_adapter_is_advised_as_it_was_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    few = ["--num-prompts", "4", "--num-samples", "2", "--lora-r", "2", "--lora-alpha", "3"]
    assert main(["advise", "--task", "vowels", *few, "--json", "a.json"]) == 0
    line = capsys.readouterr().out.partition("Run it: ")[2].splitlines()[0]
    arguments = parsed(line)
    assert (arguments.lora_r, arguments.lora_alpha) == (2, 3)
    (reason,) = [
        s for s in json.loads((tmp_path / "a.json").read_text())["settings"] if s["name"] == "lora_r"
    ]
    own, whole = (int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", reason["reason"]))
    assert 0 < own < whole / 5


def test_values_are_written_for_people():
    assert [written(x) for x in (None, (), (64, 64), 0.0002, True)] == [
        *("none", "none", "64 x 64", "0.0002", "True")
    ]
