"""`tokenrl advise --env`: measurements, the settings that follow, and refusals."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from command_line import completes

from tokenrl.advisor.advice import command_line
from tokenrl.advisor.environment import advise_environment, choose_approach
from tokenrl.cli import COMMANDS
from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Spec
from tokenrl.core import Estimator
from tokenrl.flags import parse
from tokenrl.language.training.arguments import TrainArguments

CARTPOLE = Spec("CartPole-v1", 4, 2, 0, 500, 475.0, fast=True)
LANDER = Spec("LunarLander-v3", 8, 4, 0, 1000, 200.0, fast=False)
PENDULUM = Spec("Pendulum-v1", 3, None, 1, 200, None, fast=False)


pytestmark = pytest.mark.usefixtures("workplace", "cache")


def parsed(line: str):
    """The arguments that a command line stands for."""
    name, *argv = shlex.split(line)[1:]
    return parse(name, COMMANDS[name], argv)


def advised(*argv):
    """The advice, and the arguments of the command that it shows."""
    advice = advise_environment(parsed(shlex.join(["tokenrl", "advise", *argv])))
    return advice, parsed(advice.line.removeprefix("Run it: "))


@pytest.mark.parametrize(
    "spec, approach",
    [
        (CARTPOLE, "episodes"),
        (replace(CARTPOLE, horizon=501), "critic"),
        (replace(CARTPOLE, fast=False), "critic"),
        (replace(CARTPOLE, fast=False, horizon=100), "episodes"),
        (LANDER, "critic"),
        (PENDULUM, "continuous"),
    ],
)
def test_the_approach_follows_from_horizon_speed_and_actions(spec, approach):
    assert choose_approach(spec) == approach


def test_an_environment_is_measured_and_the_command_can_be_run(capsys):
    advice, arguments = advised("--env", "CartPole-v1")
    # Random play of CartPole lasts about 22 steps and pays 1 a step; 40 episodes give a standard error of 2.
    assert 14 < float(advice.measured["mean"]) < 32
    assert arguments.estimator.baseline == "timestep_mean"
    # measured, and rounded to a digit
    assert arguments.estimator.entropy_coef == pytest.approx(0.1, rel=0.2)
    assert (arguments.head, arguments.num_envs, arguments.reward_scale) == ("softmax", 64, 1.0)
    completes("advise --env CartPole-v1")
    printed = capsys.readouterr().out
    assert "timestep_mean" in printed and "tokenrl control" in printed
    words = advice.line.removeprefix("Run it: tokenrl ")
    completes(f"{words} --eval-episodes 2 --check --quiet")


def test_a_gaussian_head_has_twice_the_outputs_and_a_critic_scaled_rewards():
    advice, arguments = advised("--env", "Pendulum-v1", "--episodes", "2")
    assert arguments.head == "gaussian" and arguments.reward_scale < 1
    assert arguments.estimator.gamma == 0.95  # no episode of Pendulum ends by itself
    assert {"estimator.baseline", "reward_scale", "num_iterations"} <= advice.reasons.keys()
    assert "GAE" in advice.reasons["estimator.returns"][1]


@pytest.mark.parametrize(
    "argv, flags",
    [
        (["MountainCar-v0", "--max-episode-steps", "20", "--episodes", "5"], ["no-signal"]),
        (["CartPole-v1", "--max-episode-steps", "2", "--episodes", "5"], ["no-signal"]),
        (["gridworld", "--max-episode-steps", "12", "--episodes", "100"], ["no-signal"]),
        (["CartPole-v1", "--episodes", "20"], []),
    ],
)
def test_returns_that_do_not_differ_are_doubted(argv, flags):
    advice, _ = advised("--env", *argv)
    assert [finding.flag for finding in advice.findings] == flags


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
    assert parsed(command_line(name, arguments)) == arguments


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "--env ID for an agent"),
        (["--env", "CartPole-v1", "--run", "runs/a"], "--env ID for an agent"),
        (
            ["--task", "vowels", "--num-prompts", "8"],
            "--task or --num-prompts. Advice for a language task",
        ),
        (["--env", "CartPole-v7"], "CartPole-v7"),
    ],
)
def test_refusals_are_one_paragraph_and_exit_code_2(argv, words, refusal):
    error = refusal("advise", *argv)
    assert words in error and error.count("\n") == 1
