"""The life of a run, on a training that only counts."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from tokenrl.errors import Refused, Stopped
from tokenrl.runs.checkpoint import verify_checkpoint
from tokenrl.runs.outcome import Outcome, model_directory
from tokenrl.runs.session import Session


@dataclass
class Settings:
    max_steps: int = 5
    task: object = "counting"


class Counter:
    """A training whose only state is a number."""

    def __init__(self):
        self.number = 0

    def state_dict(self):
        return {"number": self.number}


def write_model(folder):
    (folder / "model.txt").write_text("trained")


def live(directory, at_step=lambda session: None, *, every=2, evaluate=True, settings=None, **options):
    """A whole run; `at_step` is called in the middle of each step."""
    counter = Counter()
    with Session("train", directory, quiet=True, **options) as session:
        session.register(counter=counter)
        session.open("counting", {})
        session.evaluated({"reward": 0.0})
        session.begin(settings or Settings(), names={"task": "an object"}, title="counting")
        for step in session.steps(5):
            counter.number += step
            at_step(session)
            metrics = {"reward": float(step)}
            if evaluate and session.due(every):
                metrics |= session.evaluated({"reward": 10.0 * step})
            session.record(metrics, {"seconds": 1.0})
            if session.due(every, at_the_end=False):
                session.save(write_model, keep=None)
        if session.owes_evaluation:
            session.evaluated({"reward": -1.0})
        ended = Outcome(**session.outcome("finished"))
        session.finish(ended, write_model)
        return ended


def lines(directory, name="metrics.jsonl"):
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def test_a_run_from_its_directory_to_its_end(tmp_path):
    ended = live(tmp_path)
    assert (ended.exit_reason, ended.exit_code, ended.steps) == ("finished", 0, 5)
    assert (ended.eval_before, ended.eval_after) == ({"reward": 0.0}, {"reward": 50.0})
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in lines(tmp_path, "timings.jsonl")] == [1, 2, 3, 4, 5]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() == {"exit_reason", "steps", "eval_before", "eval_after", "wall_seconds"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["kind"], config["max_steps"], config["task"]) == ("train", 5, "counting")
    assert config["command"] == f"tokenrl train --config {tmp_path / 'config.json'} --overwrite"
    assert (tmp_path / "model" / "model.txt").exists() and (tmp_path / "report.html").exists()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000002",
        "step_000004",
    ]
    verify_checkpoint(tmp_path / "checkpoints" / "step_000004")
    state = json.loads((tmp_path / "checkpoints" / "step_000004" / "trainer_state.json").read_text())
    assert state == {"step": 4, "counter": {"number": 1 + 2 + 3 + 4}}


def test_an_object_is_written_down_by_its_name(tmp_path):
    live(tmp_path, settings=Settings(task=SimpleNamespace()))
    assert json.loads((tmp_path / "config.json").read_text())["task"] == "an object"


@pytest.mark.parametrize(
    ("number", "reason", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "SIGINT", 130)]
)
def test_a_signal_finishes_the_step_and_saves_without_an_evaluation(tmp_path, number, reason, code):
    def at_step(session):
        if session.step == 3:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    ended = live(tmp_path, at_step)
    assert (ended.exit_reason, ended.exit_code, ended.steps) == (reason, code, 3)
    assert ended.eval_after == {} and lines(tmp_path)[-1]["step"] == 3
    assert (tmp_path / "model" / "model.txt").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["exit_reason"] == reason
    assert signal.getsignal(number) == before


def test_a_signal_while_the_report_is_written_ends_the_program_after_the_run(tmp_path):
    """The outcome already says 'finished', so a program that makes one run after another must hear of it."""

    def interrupted(run):
        signal.raise_signal(signal.SIGINT)
        (run / "report.html").write_text("whole")
        return run / "report.html"

    with pytest.raises(KeyboardInterrupt):
        live(tmp_path, report=interrupted)
    assert (tmp_path / "report.html").read_text() == "whole"
    assert json.loads((tmp_path / "summary.json").read_text())["exit_reason"] == "finished"
    with pytest.raises(Refused, match="overwrite"):  # the directory is unlocked, and holds the run
        live(tmp_path)


def test_a_loop_that_breaks_off_owes_the_last_evaluation(tmp_path):
    ended = live(tmp_path, evaluate=False)
    assert ended.eval_after == {"reward": -1.0}


def test_what_stops_a_run_is_written_down_with_the_last_checkpoint(tmp_path):
    def at_step(session):
        if session.step == 4:
            raise Stopped("The reward has gone.")

    with pytest.raises(Stopped, match=r"At step 4: The reward has gone. The last .* is .*step_000002"):
        live(tmp_path, at_step)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["exit_reason"], summary["steps"], summary["eval_after"]) == ("failed", 3, None)
    assert summary["error"] == "The reward has gone."
    assert not (tmp_path / "model").exists() and (tmp_path / "report.html").exists()
    live(tmp_path, overwrite=True)  # the lock was given back


def test_what_stops_a_run_without_checkpoints_says_so(tmp_path):
    def at_step(session):
        raise Stopped("Out of luck.")

    with pytest.raises(Stopped, match=r"At step 1: Out of luck. No checkpoint had been saved"):
        live(tmp_path, at_step)


def test_what_goes_wrong_before_the_first_step_is_a_refusal_and_loses_nothing(tmp_path):
    live(tmp_path)
    kept = (tmp_path / "metrics.jsonl").read_text()
    with (
        pytest.raises(Refused, match="Before the first step: no reward"),
        Session("train", tmp_path, quiet=True, overwrite=True) as session,
    ):
        session.open("counting", {})
        raise Stopped("no reward")
    assert (tmp_path / "metrics.jsonl").read_text() == kept
    assert live(tmp_path, overwrite=True).steps == 5


def test_other_errors_pass_and_leave_the_directory_unlocked(tmp_path):
    def at_step(session):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        live(tmp_path, at_step)
    assert live(tmp_path, overwrite=True).steps == 5


def test_a_second_run_in_the_directory_is_refused_while_the_first_is_at_work(tmp_path):
    def at_step(session):
        with pytest.raises(Refused, match="holds its lock"):
            Session("sft", tmp_path, overwrite=True)

    assert live(tmp_path, at_step).steps == 5


def test_only_the_main_process_writes_and_all_stop_together(tmp_path):
    asked = []

    def agreed(number):
        asked.append(number)
        return signal.SIGTERM if len(asked) == 3 else number  # another process was asked to stop

    ended = live(tmp_path / "other", main=False, agreed=agreed)
    assert not (tmp_path / "other").exists()
    assert (ended.exit_reason, ended.exit_code, ended.steps) == ("SIGTERM", 143, 2)


def test_a_warning_is_given_once_for_each_topic(tmp_path, capsys):
    with Session("train", tmp_path) as session:
        for topic in ("one", "two", "one"):
            session.warn_once(topic, f"about {topic}")
    assert capsys.readouterr().out.splitlines() == ["warning: about one", "warning: about two"]


@pytest.mark.parametrize(
    ("every", "at_the_end", "expected"),
    [(2, True, [2, 4, 5]), (2, False, [2, 4]), (0, True, [5]), (0, False, [])],
)
def test_what_is_due(tmp_path, every, at_the_end, expected):
    with Session("train", tmp_path, quiet=True) as session:
        found = [step for step in session.steps(5) if session.due(every, at_the_end=at_the_end)]
    assert found == expected


def test_a_run_directory_stands_for_its_model(tmp_path):
    live(tmp_path)
    assert model_directory(tmp_path) == tmp_path / "model"
    assert model_directory(str(tmp_path / "model")) == str(tmp_path / "model")
    assert model_directory("owner/name") == "owner/name"
