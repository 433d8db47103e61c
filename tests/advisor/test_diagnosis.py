"""`tokenrl advise --run`: running and finished runs, what is refused, the command that follows, its files."""

from __future__ import annotations

import json
import shlex

import pytest

from tokenrl.advisor.diagnosis import advise_run, together
from tokenrl.advisor.show import Finding
from tokenrl.cli import COMMANDS, main
from tokenrl.configuration import configured
from tokenrl.core import Estimator
from tokenrl.flags import parse
from tokenrl.runs.directory import RunDirectory


def parsed(line: str):
    """The arguments that a command line stands for."""
    name, *argv = shlex.split(line)[1:]
    return parse(name, COMMANDS[name], argv)


def test_a_finished_a_running_and_a_killed_run_are_told_apart(made_up):
    said = advise_run(str(made_up("train"))).facts["status"]
    assert said == "40 of 40 steps (100%); ended (finished)"
    running = advise_run(str(made_up("train", running=True, steps=10)))
    assert running.facts["status"] == "10 of 40 steps (25%); still running, there is no summary.json yet"
    assert running.measurements["running"] is True
    killed = made_up("control", steps=10)
    (killed / "summary.json").unlink()
    assert "10 of 40" in (said := advise_run(str(killed)).facts["status"]) and said.endswith("it was killed")


def test_a_failure_is_quoted(made_up):
    path = made_up("train", steps=5)
    (path / "summary.json").write_text(json.dumps({"exit_reason": "failed", "error": "the disk is full"}))
    assert "ended (failed): the disk is full" in advise_run(str(path)).facts["status"]


def test_reading_a_running_run_does_not_disturb_it(made_up):
    path = made_up("train", running=True, steps=10)
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    advise_run(str(path))
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "rew')  # the line that is being written
    assert advise_run(str(path)).measurements["steps"] == 10


def test_the_command_repeats_the_run_with_the_changes(made_up):
    path = made_up("train", entropy=0.05, completions__clipped_ratio=0.3)
    advice = advise_run(str(path))
    assert advice.again == (
        f"tokenrl train --config {path}/config.json --output-dir {path}-2 "
        "--estimator.entropy-coef 0.01 --max-completion-length 32"
    )
    arguments = parsed(advice.again)
    assert arguments == advice.arguments
    assert arguments.estimator == Estimator(entropy_coef=0.01)
    assert (arguments.max_completion_length, arguments.output_dir) == (32, f"{path}-2")
    old = configured(COMMANDS["train"].arguments, path, "train")
    assert (old.max_completion_length, old.estimator, old.output_dir == str(path)) == (16, Estimator(), False)


def test_the_new_directory_is_one_that_does_not_exist(made_up):
    path = made_up("control")
    path.with_name(f"{path.name}-2").mkdir()
    assert f"--output-dir {path}-3" in advise_run(str(path)).again


def test_the_current_directory_may_be_the_run(made_up, monkeypatch):
    path = made_up("control")
    monkeypatch.chdir(path)
    again = advise_run(".").again
    assert again.startswith(f"tokenrl control --config config.json --output-dir {path.resolve()}-2")


def test_a_threshold_may_be_infinite(made_up):
    advice = advise_run(str(made_up("control", solved=float("inf"))))
    assert advice.facts["solved at"] == "inf, not reached"


def test_of_two_changes_to_one_setting_the_first_act_counts():
    def finding(verdict, changes):
        return Finding("x", verdict, "", None, (1, 2), changes)

    found = [
        finding("watch", {"a": 1, "b": 1}),
        finding("act", {"a": 2}),
        finding("act", {"a": 3, "c": 3}),
    ]
    assert together(found) == {"a": 2, "b": 1, "c": 3}


def test_the_files_hold_what_is_printed(made_up, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = made_up("control", entropy=0.01, reward_std=12.0)
    files = ["--json", "a.json", "--markdown", "a.md", "--config", "c.json"]
    assert main(["advise", "--run", str(path), *files]) == 0
    shown = capsys.readouterr().out
    assert "Run it again with: tokenrl control --config c.json" in shown and "entropy-collapsed" in shown
    record = json.loads((tmp_path / "a.json").read_text())
    entropy = next(finding for finding in record["findings"] if finding["topic"] == "entropy")
    assert (entropy["verdict"], entropy["value"], entropy["steps"]) == ("act", 0.01, [37, 40])
    assert record["measurements"]["changes"] == {"estimator.entropy_coef": 0.1}
    assert parsed("tokenrl control --config c.json").estimator.entropy_coef == 0.1
    document = (tmp_path / "a.md").read_text()
    assert "| entropy | act | entropy-collapsed: 0.01 nats per action" in document
    assert "## Run it again with\n\n```sh\ntokenrl control --config c.json\n```" in document


def test_runs_that_cannot_be_diagnosed_are_refused(made_up, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    foreign = tmp_path / "sft"
    with RunDirectory.create(foreign) as run:
        run.write_config({"kind": "sft"})
    nameless = tmp_path / "nameless"
    with RunDirectory.create(nameless) as run:
        run.write_config({})
    broken = made_up("train")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join([*lines[:3], "{broken\n", *lines[4:]]))
    without = made_up("train")
    (without / "metrics.jsonl").unlink()
    cases = {
        tmp_path / "nowhere": "holds no run",
        empty: "holds no run",
        foreign: "is a run of `tokenrl sft`",
        nameless: "an unknown command",
        made_up("train", steps=0): "has not made a step yet",
        made_up("control", reward=float("nan")): "in which an episode ended",  # pieces of long episodes
        made_up("control", reward=float("inf")): "with a finite reward",
        broken: "Line 4 of",
        without: "cannot be read",
    }
    for path, words in cases.items():
        assert main(["advise", "--run", str(path)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, path


def test_an_environment_that_is_gone_leaves_the_horizon_unknown(made_up):
    path = made_up("control", settings={"env": "Gone-v1", "estimator": Estimator(baseline="none")})
    found = {finding.topic: finding for finding in advise_run(str(path)).findings}
    assert "of unknown length" in found["horizon"].text and found["horizon"].verdict == "act"
    assert "truncation" not in found


@pytest.mark.parametrize("kind", ["control", "train"])
def test_a_real_run_from_end_to_end(kind, tmp_path, capsys, monkeypatch):
    """Two tiny runs: the diagnosis reads what they wrote, and its command runs."""
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    control = ["--env", "gridworld", "--num-envs", "8", "--eval-episodes", "10", "--diagnostics-every", "2"]
    train = ["--task", "vowels", "--prompts-per-step", "4", "--num-generations", "2", "--eval-every", "0"]
    own = control if kind == "control" else [*train, "--eval-generations", "2"]
    assert main([kind, *own, "--max-steps", "4", "--output-dir", "run", "--quiet"]) == 0
    assert main(["advise", "--run", "run", "--json", "a.json"]) == 0
    shown = capsys.readouterr().out
    assert "4 of 4 steps (100%)" in shown and "finished" in shown
    record = json.loads((tmp_path / "a.json").read_text())
    topics = [finding["topic"] for finding in record["findings"]]
    assert topics[:5] == ["progress", "entropy", "gradient noise", "signal", "truncation"]
    noise = record["findings"][2]
    assert (noise["value"] is not None) == (kind == "control")  # only that run measured it
    line = shown.partition("Run it again with: ")[2].splitlines()[0]
    assert main([*shlex.split(line)[1:], "--check"]) == 0
    assert not list((tmp_path / "run-2").glob("*.json")) and (tmp_path / "run" / "config.json").exists()
