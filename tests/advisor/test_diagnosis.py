"""`tokenrl advise --run`: findings in runs, refusals, and the command that follows."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from command_line import completes
from folders import read_json
from refusals import refused

from tokenrl.advisor.diagnosis import advise_run
from tokenrl.cli import COMMANDS, main
from tokenrl.core import Estimator
from tokenrl.files import write_json
from tokenrl.flags import parse

PIECES = {"estimator": Estimator.preset("ppo"), "num_steps": 16}


def entropy_of(value):
    """Entropy that reaches `value` only in the last tenth of 40 steps, which are those that count."""
    return lambda step: value if step > 36 else 1.0


CASES = [  # the kind of run and its metrics; flag and weight of the finding
    ("train", {"entropy": entropy_of(0.05)}, "entropy-collapsed", "act"),
    ("control", {"entropy": 0.01, "reward_std": 12.0}, "entropy-collapsed", "act"),
    ("train", {"frac_reward_zero_std": 0.99, "solved": 0.7}, "no-signal", "watch"),
    ("train", {"frac_reward_zero_std": 0.99, "reward": 0.96}, "no-signal", "watch"),
    (
        "train",
        {"explained_variance": 0.01, "settings": {"estimator": Estimator.preset("a2c")}},
        "critic-useless",
        "act",
    ),
    ("train", {"prompts__effective": 3.0}, "few-prompts", "act"),
    (
        "control",
        {"skipped_steps": 1, "settings": PIECES | {"num_iterations": 4}},
        "skipped",
        "watch",
    ),
]


def findings_of(path):
    return {finding.flag: finding for finding in advise_run(str(path)).findings}


@pytest.mark.parametrize(("kind", "run", "flag", "weight"), CASES)
def test_findings_in_a_run(made_up, kind, run, flag, weight):
    assert findings_of(made_up(kind, **run))[flag].weight == weight


@pytest.mark.parametrize("flags", [["nothing-learnt"], []])
def test_after_nothing_was_learnt_it_is_named_what_to_change(made_up, flags):
    run = made_up("train", evaluated={0: 0.2, 40: 0.21})
    write_json(run / "summary.json", read_json(run / "summary.json") | {"flags": flags})
    found = findings_of(run)
    assert ("nothing-learnt" in found) == bool(flags)


@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("train", {}),
        ("control", {"evaluated": {0: 20.0, 20: 480, 40: 476}, "solved": 475.0}),
        ("control", {"entropy": -3.0, "settings": {"env": "Pendulum-v1", "head": "gaussian"}}),
        ("train", {"entropy": lambda step: 1.0 if step > 36 else 0.01}),
        (
            "control",
            {"reward_std": 0.0, "settings": {"num_envs": 1}},
        ),  # episodes that are not compared
    ],
)
def test_a_healthy_run_has_no_findings(made_up, kind, run):
    assert findings_of(made_up(kind, **run)) == {}


LOST = {
    "evaluated": {0: 0.4},
    "reward": lambda step: 0.4 if step == 1 else 0.0,
    "reward_stderr": lambda step: 0.05 if step == 1 else 0.0,
    "frac_reward_zero_std": lambda step: 0.1 if step == 1 else 1.0,
    "completions__clipped_ratio": 0.5,
}


def test_a_destroyed_policy_is_not_mistaken_for_a_task_that_is_too_hard(made_up):
    findings = findings_of(made_up("train", settings={"learning_rate": 8e-4}, **LOST))
    assert findings["policy-destroyed"].text.endswith("try --learning-rate 0.0002.")
    assert "policy-destroyed" not in findings_of(
        made_up("train", **LOST | {"evaluated": {0: 0.4, 40: 0.9}})
    )


@pytest.mark.parametrize("solved", [None, 0.95])
def test_a_task_that_was_solved_at_once_gets_no_higher_rate_and_no_command(made_up, capsys, solved):
    run = {
        "reward": 1.0,
        "reward_std": 0.0,
        "frac_reward_zero_std": 1.0,
        "evaluated": {0: 1.0, 40: 1.0},
    }
    path = made_up("train", solved=solved, completions__clipped_ratio=0.2, **run)
    completes("advise --run", str(path))
    output = capsys.readouterr().out
    assert "solves its task" in output and "tokenrl train" not in output


def status_of(path):
    return advise_run(str(path)).measured["status"]


def test_a_finished_a_running_and_a_killed_run_have_their_status(made_up):
    assert status_of(made_up("train")) == "40 of 40 steps (100%); finished, 40 steps"
    path = made_up("train", running=True, steps=10)
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    assert "10 of 40 steps (25%); still running" in status_of(path)
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "rew')  # the line that is being written
    assert "10 of 40" in status_of(path)
    killed = made_up("control", steps=10)
    (killed / "summary.json").unlink()
    assert status_of(killed).endswith("; unfinished")


def test_the_command_repeats_the_run(made_up):
    settings = {"resume": "auto"}  # of the run that is diagnosed
    path = made_up("train", entropy=0.05, completions__clipped_ratio=0.3, settings=settings)
    advice = advise_run(str(path))
    texts = " ".join(finding.text for finding in advice.findings)
    assert "--estimator.entropy-coef" in texts and "--max-completion-length" in texts
    command = f"tokenrl train --config {path}/config.json"
    assert advice.line.endswith(f": {command}")
    arguments = parse("train", COMMANDS["train"], shlex.split(command)[2:])
    assert arguments.max_completion_length == 16 and arguments.learning_rate == 1e-3
    assert arguments.output_dir is None and arguments.resume is None, (
        "another run, in a new directory"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": "many"}, "max_steps was given as 'many'"),
        ({"estimator": {"baseline": "rlo"}}, "Did you mean 'rloo'"),
        ({"solved": "soon"}, "a file of it is damaged or was changed"),
        ({"max_steps": None}, "a file of it is damaged or was changed"),
        ({"kind": "sft"}, "is a run of `tokenrl sft`"),
        (None, "config.json cannot be read"),
    ],
)
def test_a_run_whose_configuration_was_changed_is_refused(made_up, changes, words):
    path = made_up("train")
    config = read_json(path / "config.json")
    text = "{" if changes is None else json.dumps(config | changes)
    (path / "config.json").write_text(text)
    with refused(re.escape(words)):
        advise_run(str(path))


def test_runs_that_cannot_be_diagnosed_are_refused(made_up, tmp_path, refusal):
    broken = made_up("train")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join([*lines[:3], "{broken\n", *lines[4:]]))
    for path, words in {
        tmp_path / "nowhere": "holds no metrics.jsonl",
        made_up("train", steps=0): "has not made a step yet",
        made_up("control", reward=float("nan")): "in which an episode ended",  # pieces of long ones
        broken: "Line 4 of",
    }.items():
        error = refusal("advise --run", str(path))
        assert words in error and error.count("\n") == 1, path


REAL = {
    "control": "--env gridworld --num-envs 8 --eval-episodes 10",
    "train": "--task vowels --prompts-per-step 4 --num-generations 2 --eval-every 0 --eval-generations 2",
}


@pytest.mark.parametrize("kind", ["control", pytest.param("train", marks=pytest.mark.slow)])
def test_a_real_run_from_end_to_end(kind, workplace, cache, capsys):
    """Two tiny runs: the diagnosis reads what they wrote, and its command runs."""
    flags = [*REAL[kind].split(), "--max-steps", "4", "--output-dir", "run", "--quiet"]
    completes(kind, *flags)
    completes("advise --run run")
    output = capsys.readouterr().out
    assert "4 of 4 steps (100%)" in output and "finished" in output
    line = output.partition("should change: tokenrl ")[2].partition("\n")[0]
    assert main([*shlex.split(line), "--check"]) in (0, 2)
    assert not (workplace / "runs").exists()


NAMED = {
    "control": {"env": "{}:Mine-v0", "estimator": {"baseline": "{}:run"}},
    "train": {
        "task": "{}:run",
        "reward": ["{}:run"],
        "model": "{}:run",
        "estimator": {"baseline": "{}:run"},
    },
}
"""Settings of a run that name code, by kind."""


@pytest.mark.parametrize("command", ["advise --run a", "report a", "report a b"])
@pytest.mark.parametrize(("kind", "source"), [("control", "mine.py"), ("train", "mine")])
def test_reading_a_run_executes_nothing_that_it_names(made_up, workplace, kind, source, command):
    (workplace / "mine.py").write_text("open('executed', 'w')")
    for name in ("a", "b"):
        counts = {"num_samples": lambda step: 8 * step, "episodes": 8, "grad_clipped": 0.0}
        made_up(kind, **counts).rename(workplace / name)
        config = read_json(workplace / name / "config.json")
        changes = json.loads(json.dumps(NAMED[kind]).replace("{}", source))
        changes["estimator"] = config["estimator"] | changes["estimator"]
        changes |= {"seed": 0, "learning_rate": {"a": 0.01, "b": 0.02}[name]}
        write_json(workplace / name / "config.json", config | changes)
    completes(command)
    assert not (workplace / "executed").exists()
