"""The life of a run, on a training that only counts."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenrl.errors import Refused, Stopped
from tokenrl.runs.checkpoint import Saver, SavingArguments, checkpoints, read_state
from tokenrl.runs.folders import model_directory, verify
from tokenrl.runs.reader import Outcome
from tokenrl.runs.resume import Maker
from tokenrl.runs.session import Session


@dataclass
class Settings:
    max_steps: int = 5
    task: object = "counting"


class Counter:
    """A training whose state is a number and a moment, and whose model is one weight."""

    def __init__(self):
        self.number = 0
        self.weight, self.moment = torch.zeros(1), torch.zeros(1)

    def update(self, step):
        self.number += step
        self.moment += self.number
        self.weight += step * self.moment

    def state_dict(self):
        return {"number": self.number, "moment": self.moment}

    def load_state_dict(self, state):
        self.number, self.moment = state["number"], state["moment"]

    def write(self, folder):
        save_file({"weight": self.weight}, folder / "weights.safetensors")

    def read(self, folder):
        self.weight.copy_(load_file(folder / "weights.safetensors")["weight"])

    def tensors(self):
        return [self.weight]


def nothing(session):
    pass


def test_processes_beside_the_main_one_continue_from_a_checkpoint_and_never_write_one(tmp_path):
    counter, beside = Counter(), Counter()
    main, other = (Saver(tmp_path, SavingArguments(), active=active) for active in (True, False))
    main.keep(counter, {"counter": counter})
    other.keep(beside, {"counter": beside})
    counter.update(1)
    main.settle(1)
    main.save()
    assert other.restore(tmp_path / "step_000001") == 1 and beside.weight == counter.weight == 1
    beside.update(2)
    other.settle(2)
    other.save()  # as every process does whose run fails
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def live(
    directory,
    at_step=nothing,
    *,
    before=nothing,
    every=2,
    evaluate=True,
    settings=None,
    maker=None,
    resume=None,
    save_every=2,
    **options,
):
    """A whole run; `before` is called at the start of each step, and `at_step` after its update."""
    counter, settings = Counter(), settings or Settings()
    saving = SavingArguments(save_every=save_every, save_minutes=0, keep_checkpoints=2, resume=resume)
    with Session("train", directory, quiet=True, saving=saving, **options) as session:
        session.keep(counter, maker or Maker(), counter=counter)
        session.open("counting", {})
        if not session.continues:
            session.evaluated({"reward": 0.0})
        session.begin(settings, names={"task": "an object"}, title="counting")
        for step in session.steps(settings.max_steps):
            before(session)
            counter.update(step)
            at_step(session)
            metrics = {"reward": float(counter.weight) / counter.number}
            if evaluate and session.due(every):
                metrics |= session.evaluated({"reward": 10.0 * step})
            session.record(metrics, {"seconds": 1.0})
        if session.owes_evaluation:
            session.evaluated({"reward": -1.0})
        ended = Outcome(**session.outcome("finished"))
        session.finish(ended, counter.write)
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
    assert (tmp_path / "model" / "weights.safetensors").exists() and (tmp_path / "report.html").exists()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000004",
        "step_000005",
    ]
    verify(tmp_path / "checkpoints" / "step_000004")
    state = read_state(tmp_path / "checkpoints" / "step_000004")
    assert (state["step"], state["counter"]["number"]) == (4, 1 + 2 + 3 + 4)


def test_a_budget_of_another_kind_makes_a_step_the_last_and_may_grow(tmp_path):
    def bounded(most):
        return lambda session: setattr(session, "spent", lambda: session.step >= most)

    ended = live(tmp_path, at_step=bounded(3), settings=Settings(max_steps=9))
    assert (ended.exit_reason, ended.steps) == ("finished", 3)
    assert [row["step"] for row in lines(tmp_path) if "eval_reward" in row] == [0, 2, 3]
    assert read_state(tmp_path / "checkpoints" / "step_000003")["session"]["ended"] is None
    more = live(tmp_path, at_step=bounded(5), settings=Settings(max_steps=9), resume="auto")
    assert (more.steps, more.eval_after) == (5, {"reward": 50.0})


@pytest.mark.parametrize(
    ("number", "reason", "code"),
    [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "SIGINT", 130), (signal.SIGHUP, "SIGHUP", 129)],
)
def test_a_signal_finishes_the_step_and_saves_without_an_evaluation(tmp_path, number, reason, code):
    def at_step(session):
        if session.step == 3:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    ended = live(tmp_path, at_step)
    assert (ended.exit_reason, ended.exit_code, ended.steps) == (reason, code, 3)
    assert ended.eval_after == {} and lines(tmp_path)[-1]["step"] == 3
    assert (tmp_path / "model" / "weights.safetensors").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["exit_reason"] == reason
    assert signal.getsignal(number) == before
    live(tmp_path, resume="auto")
    live(tmp_path / "whole")
    assert same(tmp_path / "whole", tmp_path)  # as if no signal had come


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


def test_a_step_that_fails_before_its_update_leaves_a_checkpoint_of_the_step_before(tmp_path):
    def before(session):
        if session.step == 4:
            raise Stopped("The reward has gone.")

    with pytest.raises(Stopped, match=r"At step 4: The reward has gone. The last .* is .*step_000003"):
        live(tmp_path, before=before)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["exit_reason"], summary["steps"], summary["eval_after"]) == ("failed", 3, None)
    assert summary["error"] == "The reward has gone."
    assert not (tmp_path / "model").exists() and (tmp_path / "report.html").exists()
    live(tmp_path, overwrite=True)  # the lock was given back


def test_a_step_that_fails_after_its_update_does_not_save_weights_of_no_step(tmp_path):
    def at_step(session):
        if session.step == 4:
            raise Stopped("The reward has gone.")

    with pytest.raises(Stopped, match=r"The last complete checkpoint is .*step_000002"):
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
        live(tmp_path, before=at_step)
    assert json.loads((tmp_path / "summary.json").read_text())["error"] == "ZeroDivisionError"
    assert live(tmp_path, overwrite=True).steps == 5


def test_only_the_main_process_writes_and_all_stop_together(tmp_path):
    asked = []

    def agreed(numbers):
        asked.append(numbers)
        return [signal.SIGTERM, 0] if len(asked) == 3 else numbers  # another process was asked to stop

    ended = live(tmp_path / "other", main=False, agreed=agreed)
    assert not (tmp_path / "other").exists()
    assert (ended.exit_reason, ended.exit_code, ended.steps) == ("SIGTERM", 143, 2)


def test_a_warning_is_given_once_for_each_topic(tmp_path, capsys):
    with Session("train", tmp_path) as session:
        for topic in ("one", "two", "one"):
            session.warn_once(topic, f"about {topic}")
    assert capsys.readouterr().out.splitlines() == ["warning: about one", "warning: about two"]


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing is saved."""


def same(one, other):
    """Whether two runs have left the same lines, and the same weights."""
    weights = [load_file(run / "model" / "weights.safetensors")["weight"] for run in (one, other)]
    return lines(one) == lines(other) and torch.equal(*weights)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_run_that_was_killed_continues_to_the_same_end(tmp_path, step):
    def at_step(session):
        if session.step == step:
            raise Killed

    whole = live(tmp_path / "whole")
    with pytest.raises(Killed):
        live(tmp_path / "run", at_step)
    ended = live(tmp_path / "run", resume="auto")
    assert same(tmp_path / "whole", tmp_path / "run")
    assert (ended.steps, ended.eval_before, ended.eval_after) == (5, whole.eval_before, whole.eval_after)


def test_a_continuation_replays_what_was_done_after_the_checkpoint(tmp_path):
    live(tmp_path / "whole")
    seen = []
    live(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # cut by a crash
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000004"
    live(tmp_path / "run", lambda session: seen.append(session.step), resume=str(checkpoint))
    assert seen == [5] and same(tmp_path / "whole", tmp_path / "run")
    assert [row["step"] for row in lines(tmp_path / "run", "timings.jsonl")] == [1, 2, 3, 4, 5]


def test_nothing_is_left_to_do_for_a_run_that_has_finished_and_max_steps_may_grow(tmp_path):
    live(tmp_path, settings=Settings(max_steps=3))
    seen = []
    ended = live(tmp_path, seen.append, settings=Settings(max_steps=3), resume="auto")
    assert (seen, ended.exit_reason, ended.steps) == ([], "finished", 3)
    live(tmp_path, lambda session: seen.append(session.step), resume="auto")
    assert seen == [4, 5] and [row["step"] for row in lines(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "config.json").read_text())["max_steps"] == 5


def test_there_is_nothing_to_continue_before_the_first_checkpoint_so_the_run_starts(tmp_path):
    assert live(tmp_path / "new", resume="auto").steps == 5

    def at_step(session):
        raise Killed

    with pytest.raises(Killed):
        live(tmp_path / "killed", at_step)
    assert live(tmp_path / "killed", resume="auto").steps == 5


def test_a_damaged_checkpoint_is_skipped_and_named_and_an_explicit_one_refused(tmp_path, capsys):
    live(tmp_path)
    newest = tmp_path / "checkpoints" / "step_000005"
    (newest / "weights.safetensors").write_bytes(b"")
    with pytest.raises(Refused, match=r"weights\.safetensors"):
        live(tmp_path, resume=str(newest))
    seen = []
    live(tmp_path, lambda session: seen.append(session.step), resume="auto")
    assert seen == [5] and verify(newest) is None


def test_without_a_whole_checkpoint_a_run_with_results_is_not_started_again(tmp_path):
    live(tmp_path)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        (checkpoint / "weights.safetensors").write_bytes(b"")
    with pytest.raises(Refused, match=r"cannot be continued.*step_000005.*--overwrite"):
        live(tmp_path, resume="auto")
    assert (tmp_path / "model").exists()


def test_a_continuation_with_other_settings_is_refused_and_changes_nothing(tmp_path):
    live(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(Refused, match="task: 'counting', now 'sorting'"):
        live(tmp_path, resume="auto", settings=Settings(task="sorting"))
    with pytest.raises(Refused, match=r"other data or models: tokenizer: .* now 'abc'\. Restore"):
        live(tmp_path, resume="auto", maker=Maker({"tokenizer": "abc"}))
    with pytest.raises(Refused, match=r"other processes: processes: 1, now 2\. They split"):
        live(tmp_path, resume="auto", maker=Maker(processes=2))
    with pytest.raises(Refused, match="give one of both"):
        live(tmp_path, resume="auto", overwrite=True)
    with pytest.raises(Refused, match="checkpoint of the run in output_dir"):
        live(tmp_path, resume=str(tmp_path / "elsewhere"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Broken(Counter):
        def update(self, step):
            super().update(step)
            self.weight /= 3 - step  # infinite after step 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Counter", Broken)
        with pytest.raises(Stopped, match="After step 3 the weights are not finite"):
            live(tmp_path, settings=Settings(max_steps=3))
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step_000002"
    assert not (tmp_path / "model").exists()


def test_minutes_between_checkpoints(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tokenrl.runs.checkpoint.time", SimpleNamespace(monotonic=lambda: now[0]))
    saver = Saver(tmp_path, SavingArguments(save_minutes=10.0))
    counter = Counter()
    saver.keep(counter, {"counter": counter})
    due = []
    for step in range(1, 8):
        now[0] += 200.0  # seconds
        saver.settle(step)
        due.append(saver.due(step))
        if due[-1]:
            saver.save()
    assert due == [False, False, True, False, False, True, False]


def lose(directory, *, rows):
    """Remove the last rows of metrics.jsonl, as a disk may that was not synced."""
    kept = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)[:-rows]
    (directory / "metrics.jsonl").write_text("".join(kept))


def test_a_run_whose_metrics_have_lost_rows_goes_back_to_the_checkpoint_that_they_reach(tmp_path, capsys):
    live(tmp_path / "whole", settings=Settings(max_steps=7))
    run = tmp_path / "run"
    live(run)
    lose(run, rows=1)
    with pytest.raises(Refused, match=r"step_000005 cannot be continued: rows .* lost, .* up to step 4 are"):
        live(run, resume=str(run / "checkpoints" / "step_000005"), settings=Settings(max_steps=7))
    live(run, resume="auto", settings=Settings(max_steps=7))
    assert same(tmp_path / "whole", run)
    assert [row["step"] for row in lines(run, "timings.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    damaged = "step 0\n" + (run / "metrics.jsonl").read_text()
    for text, words in ((damaged, "Line 1 of .*metrics.jsonl is damaged"), ("", "only those up to step -1")):
        (run / "metrics.jsonl").write_text(text)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(Refused, match=words):
            live(run, resume="auto", settings=Settings(max_steps=9))
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_metrics_are_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    synced, fsync, rename = set(), os.fsync, os.rename

    def noted(handle):
        fsync(handle)
        synced.add((os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def checked(source, target):
        if target.parent.name == "checkpoints" and source.suffix == ".partial":
            for name in ("metrics.jsonl", "timings.jsonl"):
                found = (tmp_path / name).stat()
                assert (found.st_ino, found.st_size) in synced
            seen.append(target.name)
        rename(source, target)

    seen = []
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", checked)
    live(tmp_path)
    assert seen == ["step_000002", "step_000004", "step_000005"]


def test_settings_are_compared_with_the_checkpoint_where_config_json_is_gone(tmp_path):
    live(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(Refused, match="task: 'counting', now 'sorting'"):
        live(tmp_path, resume="auto", settings=Settings(max_steps=7, task="sorting"))
    assert live(tmp_path, resume="auto", settings=Settings(max_steps=7)).steps == 7


def test_a_reward_may_change_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = live("runs/a", lambda session: os.chdir("/"))
    assert ended.output_dir == tmp_path / "runs" / "a" and (ended.output_dir / "model").is_dir()


CPU_FULL = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."


@pytest.mark.parametrize("error", [RuntimeError(CPU_FULL), MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_memory_that_is_used_up_is_one_paragraph(tmp_path, error):
    def fail(session):
        if session.step == 3:
            raise error

    with pytest.raises(
        Stopped, match=r"At step 3: There is not enough memory .* --micro-batch-size"
    ) as caught:
        live(tmp_path / "run", before=fail)
    assert "step_000002" in str(caught.value) and "\n" not in str(caught.value)
    with (
        pytest.raises(Refused, match="Before the first step: There is not enough memory"),
        Session("train", tmp_path / "other", quiet=True) as session,
    ):
        session.open("counting", {})
        raise error
    with pytest.raises(RuntimeError, match="another"), Session("train", tmp_path / "third", quiet=True):
        raise RuntimeError("another error passes as it is")


def test_a_flipped_bit_of_the_model_is_noticed_when_it_is_loaded(tmp_path):
    live(tmp_path)
    assert model_directory(tmp_path) == tmp_path / "model" and model_directory("owner/name") == "owner/name"
    (tmp_path / "model" / "README.md").write_text("The card of the model is for people to edit.")
    assert model_directory(str(tmp_path / "model")) == str(tmp_path / "model")
    weights = tmp_path / "model" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for place in (tmp_path, tmp_path / "model"):
        with pytest.raises(Refused, match=r"model cannot be used: its file weights.safetensors was altered"):
            model_directory(place)


def test_old_checkpoints_are_refused_in_one_sentence(tmp_path):
    live(tmp_path)
    (tmp_path / "checkpoints" / "step_000004" / "manifest.json").write_text('{"step": 4, "files": {}}')
    with pytest.raises(Refused, match=r"it was written by an earlier release of tokenrl") as caught:
        live(tmp_path, resume=str(tmp_path / "checkpoints" / "step_000004"))
    assert "\n" not in str(caught.value)


GRAVE, REMARK = SimpleNamespace(flag="grave", weight="void"), SimpleNamespace(flag="remark", weight="watch")


@pytest.mark.parametrize(
    ("findings", "code", "flags"),
    [([], 0, []), ([REMARK], 0, ["remark"]), ([REMARK, GRAVE, GRAVE], 2, ["grave", "grave", "remark"])],
)
@pytest.mark.parametrize("options", [{}, {"quiet": True}, {"main": False}], ids=str)
def test_a_check_tells_problems_on_the_standard_error_and_leaves_no_directory(
    findings, code, flags, options, tmp_path, capsys
):
    with Session("train", tmp_path / "run", **options) as session:
        assert session.conclude("all parts", {"size": "3 [bold]apples"}, findings) == code
        assert session.flags == flags
    captured = capsys.readouterr()
    lines = ["tokenrl: Check not passed: 2 problems. Nothing was trained.", f"  1. {GRAVE}", f"  2. {GRAVE}"]
    assert captured.err.splitlines() == (lines if code and "main" not in options else [])
    said = " ".join(captured.out.split())
    assert ("3 [bold]apples" in said) == (not options)
    assert (f"warning: {REMARK}" in said) == (REMARK in findings and not options)
    assert ("Check passed: all parts work together." in said) == (code == 0 and not options)
    assert not (tmp_path / "run").exists()
