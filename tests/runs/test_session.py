"""The life of a run, on a training that only counts."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import deque
from dataclasses import dataclass, field, replace
from errno import ENAMETOOLONG
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import read_json
from refusals import refused, stopped
from safetensors.torch import load_file, save_file

from tokenrl.core import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.files import verify
from tokenrl.runs.best import Best
from tokenrl.runs.checkpoint import SavingArguments, checkpoints, read_state
from tokenrl.runs.console import next_commands
from tokenrl.runs.metrics import LOGS, TrackerArguments, read_metrics
from tokenrl.runs.reader import Outcome, read_run
from tokenrl.runs.resume import Provenance, check_processes, resume_settings
from tokenrl.runs.session import Session
from tokenrl.user_code import user_code


@dataclass(frozen=True)
class Settings(SavingArguments, TrackerArguments):
    output_dir: str | None = None
    overwrite: bool = False
    quiet: bool = True
    max_steps: int = 5
    eval_every: int = 2
    task: str = "counting"
    seed: int = 0
    save_every: int = 2
    save_minutes: float = 0.0
    logging_steps: int = 1
    estimator: Estimator = field(default_factory=Estimator)


class Counter:
    """A training whose state is a number and a moment, and whose model is two weights."""

    def __init__(self):
        self.number = 0
        self.weight, self.moment = torch.zeros(2), torch.zeros(1)

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

    def check(self, folder):
        self.write(folder)


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing is saved."""


def nothing(session):
    pass


def at(step, error):
    """A function of a session that raises an error at a step."""

    def act(session):
        if session.step == step:
            raise error

    return act


def raising(error):
    """A function that fails, such as an evaluation."""

    def fail(_):
        raise error

    return fail


def live(
    directory,
    at_step=nothing,
    *,
    before=nothing,
    maker=None,
    counter=None,
    accelerator=None,
    score=lambda step: {"reward": 10.0 * step},
    **options,
):
    """A whole run; `before` is called at the start of each step, and `at_step` after its update."""
    counter = counter or Counter()
    settings = Settings(output_dir=directory and str(directory), **options)
    args = resume_settings(settings, "train")
    with Session("train", args, accelerator=accelerator) as session:
        args = replace(args, output_dir=session.directory)
        parts = {"counter": counter}
        session.open(args, counter, maker or Provenance(), parts, {}, title="counting")
        if not session.continues:
            session.evaluated(score(0))
        for step in session.steps():
            before(session)
            with session.update():
                counter.update(step)
            at_step(session)
            metrics = {"reward": float(counter.weight[0]) / counter.number, "kl": math.inf}
            if session.due(args.eval_every):
                metrics |= session.evaluated(score(step))
            session.record(metrics, {"seconds": 1.0})
        if session.owes_evaluation:
            session.evaluated(score(session.step))
        ended = Outcome(**session.outcome())
        session.finish(ended, counter.write)
        return ended


def lines(directory, name="metrics.jsonl"):
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def summary_of(directory):
    return read_json(directory / "summary.json")


def bytes_of(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def same(first, second):
    """Whether two runs have left the same lines, and the same weights."""
    weights = [
        load_file(run / "model" / "weights.safetensors")["weight"] for run in (first, second)
    ]
    return lines(first) == lines(second) and torch.equal(*weights)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A whole run; its directory is left as it is."""
    return live(tmp_path_factory.mktemp("whole"))


def test_a_run_from_its_directory_to_its_end(ended):
    tmp_path = ended.output_dir
    assert (ended.exit_reason, ended.exit_code, ended.steps) == ("finished", 0, 5)
    assert (ended.eval_before, ended.eval_after) == ({"reward": 0.0}, {"reward": 50.0})
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in lines(tmp_path, "timings.jsonl")] == [1, 2, 3, 4, 5]
    keys = {"exit_reason", "steps", "eval_before", "eval_after", "wall_seconds", "warnings", "best"}
    assert summary_of(tmp_path).keys() == keys
    config = read_json(tmp_path / "config.json")
    assert (config["kind"], config["max_steps"], config["task"]) == ("train", 5, "counting")
    assert config["command"] == f"tokenrl train --config {tmp_path / 'config.json'} --overwrite"
    assert (tmp_path / "model" / "weights.safetensors").exists()
    assert (tmp_path / "report.html").exists()
    state = read_state(tmp_path / "checkpoints" / "step_000004")
    assert (state["step"], state["counter"]["number"]) == (4, 1 + 2 + 3 + 4)


@pytest.mark.parametrize(("reason", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_finishes_the_step_and_saves_without_an_evaluation(tmp_path, ended, reason, code):
    number = signal.Signals[reason]
    before = signal.getsignal(number)
    stopped = live(tmp_path, lambda session: session.step == 3 and signal.raise_signal(number))
    assert (stopped.exit_reason, stopped.exit_code, stopped.steps) == (reason, code, 3)
    assert stopped.eval_after == {} and lines(tmp_path)[-1]["step"] == 3
    assert (tmp_path / "model" / "weights.safetensors").exists()
    assert summary_of(tmp_path)["exit_reason"] == reason and signal.getsignal(number) == before
    live(tmp_path, resume="auto")
    assert same(ended.output_dir, tmp_path)  # as if no signal had come


@pytest.mark.parametrize(
    ("write", "reason", "steps"),
    [(2, "SIGTERM", 3), (4, "finished", 5), (5, "finished", 5)],  # the first is a trial
    ids=["checkpoint", "last checkpoint", "model"],
)
def test_signals_while_a_run_saves_wait_until_it_has(
    tmp_path, ended, write, reason, steps, handlers
):
    """After the last step it has finished, and passes the signal on; a second request changes nothing."""
    counter, folders, passed = Counter(), [], []
    signal.signal(signal.SIGTERM, lambda *_: passed.append(summary_of(tmp_path)["exit_reason"]))

    def interrupted(folder):
        folders.append(folder)
        if len(folders) == write:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        Counter.write(counter, folder)

    counter.write = interrupted
    live(tmp_path, counter=counter)
    summary = summary_of(tmp_path)
    assert (summary["exit_reason"], summary["steps"]) == (reason, steps)
    assert passed == ["finished"] * (steps == 5)
    live(tmp_path, resume="auto")
    assert same(ended.output_dir, tmp_path)


def test_a_step_that_fails_saves_nothing_and_names_the_last_checkpoint(tmp_path):
    def fail(session):
        session.warn_once("fell", f"step {session.step}: the policy fell.")
        at(4, Stopped("The reward has gone."))(session)

    words = r"At step 4: The reward has gone. The last .* is .*step_000002"
    with stopped(words):
        live(tmp_path, fail)
    summary = summary_of(tmp_path)
    assert summary["warnings"] == ["step 1: the policy fell."]
    assert (summary["exit_reason"], summary["steps"], summary["eval_after"]) == ("failed", 3, None)
    assert summary["error"] == "The reward has gone."
    assert not (tmp_path / "model").exists() and (tmp_path / "report.html").exists()
    assert live(tmp_path, overwrite=True).steps == 5  # the lock was given back


def test_a_refusal_at_a_step_is_a_failure_and_an_error_of_the_program_goes_on_as_it_is(tmp_path):
    with stopped("At step 3: give another table"):
        live(tmp_path, at(3, Refused("give another table.")))
    with pytest.raises(ZeroDivisionError):
        live(tmp_path, before=at(1, ZeroDivisionError()), overwrite=True)
    assert summary_of(tmp_path)["error"] == "ZeroDivisionError"


def test_what_goes_wrong_before_the_first_step_is_a_refusal_and_loses_nothing(tmp_path):
    live(tmp_path)
    before = bytes_of(tmp_path)
    with refused("Before the first step: no reward"):
        live(tmp_path, score=raising(Stopped("no reward")), overwrite=True)
    assert bytes_of(tmp_path) == before


def second_process(numbers_by_call):
    """The accelerator of the second of two processes; what both together send, by the number of the call."""
    calls = []

    def gather(numbers):
        calls.append(numbers)
        return torch.tensor([numbers_by_call.get(len(calls), numbers[0].tolist())])

    return SimpleNamespace(is_main_process=False, num_processes=2, device="cpu", gather=gather)


def test_only_the_main_process_writes_and_all_stop_together(tmp_path):
    accelerator = second_process({6: [signal.SIGTERM, 0]})  # the main process got it in step 2
    ended = live(tmp_path / "run", accelerator=accelerator)
    assert not (tmp_path / "run").exists()
    assert (ended.exit_reason, ended.exit_code, ended.steps) == ("SIGTERM", 143, 2)


def test_processes_are_not_compared_by_the_text_of_objects_that_each_makes(monkeypatch):
    texts = []
    monkeypatch.setattr(
        "tokenrl.runs.resume.gather_objects", lambda objects: texts.extend(objects) or texts
    )
    processes = SimpleNamespace(is_main_process=True, num_processes=2)
    check_processes(processes, {"output_dir": "a", "seed": 1, "reward": (partial(sum, "ab"),)})
    with refused("processes of this run differ in seed"):
        check_processes(processes, {"output_dir": "b", "seed": 2, "reward": (partial(sum, "ba"),)})


@pytest.mark.parametrize(
    ("step", "damage"),
    [(1, None), (2, None), (4, b""), (4, b'{"step": 0, "reward": 9.0}\n\xff'), (5, None)],
)
def test_a_run_that_was_killed_continues_to_the_same_end(tmp_path, ended, step, damage):
    """Also with the rows that it wrote where its logs were damaged."""
    with pytest.raises(Killed):
        live(tmp_path, at(step, Killed()))
    for log in LOGS if damage is not None else ():
        (tmp_path / log).write_bytes(damage)
    again = live(tmp_path, resume="auto")
    assert same(ended.output_dir, tmp_path) and len(lines(tmp_path, "timings.jsonl")) == 5
    results = [(x.steps, x.eval_before, x.eval_after) for x in (again, ended)]
    assert results[0] == results[1]


def test_a_continuation_replays_what_was_done_after_the_checkpoint(tmp_path, ended):
    run = tmp_path
    live(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # cut by a crash
    later = run / "completions" / "step_000005.parquet"
    later.parent.mkdir()
    later.touch()
    sessions = []
    live(run, sessions.append, resume=str(run / "checkpoints" / "step_000004"))
    assert not later.exists()
    assert len(sessions) == 1 and same(ended.output_dir, run)
    assert sessions[0].rows == read_metrics(run / "metrics.jsonl")
    assert sessions[0].training_seconds > sessions[0].step_seconds > 0  # all five steps count
    assert [row["step"] for row in lines(run, "timings.jsonl")] == [1, 2, 3, 4, 5]


REWARDS = (1, None, 5, None, 9, None, 9, None, 3, None, math.nan, None, 7, None, 2)
"""The reward of each evaluation of a run that gets worse: the best is that of step 4."""


def falling(step):
    reward = 4 if REWARDS[step] is None else REWARDS[step]
    return {"reward": reward, "loss": -reward}


def results_of(run):
    """Weights of a run's model, its checkpoints, and its summary but for time and warnings."""
    weights = load_file(run / "model" / "weights.safetensors")["weight"].tolist()
    summary = summary_of(run)
    del summary["wall_seconds"], summary["warnings"]
    return weights, [path.name for path in checkpoints(run / "checkpoints")], str(summary)


def damaged(run, step):
    (run / "checkpoints" / f"step_{step:06d}" / "weights.safetensors").write_bytes(b"")


def ending(step, reason):
    """A function of a session that ends it at a step."""
    return lambda session: session.step == step and session.end(reason)


@pytest.mark.parametrize(("act", "steps"), [(ending(5, "callback"), 14), (nothing, 5)])
def test_an_evaluation_made_because_a_run_ended_is_in_its_line_and_gone_once_it_goes_on(
    tmp_path, act, steps
):
    usual = {"score": falling, "patience": 3}
    live(tmp_path / "run", act, **usual, max_steps=steps)
    assert len(lines(tmp_path / "run")) == 6
    assert read_run(tmp_path / "run").series("eval_reward")[0] == [0, 2, 4, 5]
    live(tmp_path / "whole", **usual, max_steps=14)
    again = live(tmp_path / "run", **usual, max_steps=14, resume="auto")
    assert (again.exit_reason, again.steps) == ("no-improvement", 10)  # as without a stop
    logs = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("run", "whole")]
    assert logs[0] == logs[1]


def test_an_earlier_checkpoint_knows_its_own_best(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = {"score": falling, "keep": "best", "keep_checkpoints": 2, "save_every": 1}
    live(run, **options, max_steps=4)
    assert results_of(run)[1] == ["step_000002", "step_000003", "step_000004"]
    damaged(run, 4)  # the best of step 3 is step 2
    for directory in (run, whole):
        live(directory, **options, max_steps=6, resume="auto")
    assert results_of(run) == results_of(whole)


@pytest.mark.parametrize("metric", [None, "loss"])
def test_the_best_weights_are_kept_beside_the_newest_and_handed_over(tmp_path, metric, said):
    """Of equal evaluations the first is the best, of losses the lowest, and NaN never."""
    options = {"max_steps": 14, "score": falling, "keep": "best", "quiet": False}
    ended = live(tmp_path / "run", best_metric=metric, **options)
    words = "holds the weights of step 4"
    assert words in said()
    assert words in (tmp_path / "run" / "report.html").read_text()
    value = 9 if metric is None else -9
    assert ended.best == {"step": 4, "metric": metric or "reward", "value": value, "evaluations": 8}
    assert (ended.steps, ended.eval_after) == (14, falling(14))
    counter = Counter()
    for step in range(1, 5):
        counter.update(step)
    weights, names, _ = results_of(tmp_path / "run")
    assert weights == counter.weight.tolist()
    assert names == ["step_000004", "step_000012", "step_000014"]


def test_a_run_whose_best_checkpoint_is_damaged_says_so_and_keeps_its_last_one(tmp_path):
    options = {"max_steps": 14, "score": falling, "save_every": 5, "keep": "best"}
    with stopped(r"step_000004 cannot be used: .*step_000014; --resume auto"):
        live(tmp_path, lambda session: session.step == 12 and damaged(tmp_path, 4), **options)


UNREADABLE = [
    (deque, "it holds a collections.deque"),
    (lambda: lambda: 0, "PicklingError|AttributeError"),
    (lambda: np.array([object()]), "numpy.object_"),
]
"""What `torch.load` does not read with `weights_only`, and why."""


@pytest.mark.parametrize(("make", "reason"), UNREADABLE)
def test_a_state_that_cannot_be_read_again_is_refused_before_the_first_step_or_at_the_first_save(
    make, reason, tmp_path
):
    class Remembering(Counter):
        memory = make()

        def state_dict(self):
            return super().state_dict() | {"memory": self.memory}

    words = rf"cannot be .*({reason}).*in dicts and lists"
    with refused(f"The state of 'counter' {words}"):
        live(tmp_path / "run", counter=Remembering())
    assert not (tmp_path / "run").exists()
    counter = Remembering()
    counter.memory = []
    with stopped(f"At step 2: The state of this run {words}"):
        live(tmp_path / "run", lambda session: setattr(counter, "memory", make()), counter=counter)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_metric_without_a_direction_needs_one_from_the_user(tmp_path):
    """Whether more or less of a metric is better stands in the table, and of no other metric is it guessed."""

    def score(step):
        numbers = {"reward": 0.0, "reward_stderr": step, "mine": step, "entropy": step}
        return numbers | {"frac_rows_late": abs(step - 3), "rewards/f/mean": -step}

    options = {"score": score, "keep": "best", "max_steps": 4, "eval_every": 1}
    directions = {"reward_stderr": "more:reward_stderr or less", "many:mine": "more:mine or less"}
    directions |= {"mine": "more:mine or less:mine", "entropy": "more:entropy or"}
    directions |= {"accuracy": "no best 'accuracy': this run evaluates reward, mine, entropy"}
    for metric, words in directions.items():
        with refused(words):
            live(tmp_path / "run", **options, best_metric=metric)
    chosen = {"more:mine": 4, "less:mine": 0, "eval_frac_rows_late": 3}
    chosen |= {"rewards/f/mean": 0, "less:eval_rewards/f/mean": 4}
    for metric, step in chosen.items():
        assert (
            live(tmp_path / str(step), **options, best_metric=metric, overwrite=True).best["step"]
            == step
        ), metric


@pytest.mark.parametrize(
    ("act", "steps"), [(nothing, 3), (ending(3, "callback"), 3), (ending(3, "learnt"), 5)]
)
def test_a_run_that_has_ended_is_left_as_it_is_where_nothing_is_left_to_do(tmp_path, act, steps):
    def results():
        names = ("config.json", "report.html")  # which say how the run was started
        return {path: x for path, x in bytes_of(tmp_path).items() if path.name not in names}

    live(tmp_path, act, max_steps=steps)
    before = results()
    live(tmp_path, at(4, Killed()), max_steps=steps, resume="auto")
    assert results() == before


def test_max_steps_may_grow_for_a_run_that_has_finished(tmp_path):
    live(tmp_path, max_steps=3)
    live(tmp_path, resume="auto")
    assert [row["step"] for row in lines(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert read_json(tmp_path / "config.json")["max_steps"] == 5


def test_a_damaged_checkpoint_is_skipped_and_named_and_an_explicit_one_refused(tmp_path, said):
    live(tmp_path)
    newest = tmp_path / "checkpoints" / "step_000005"
    damaged(tmp_path, 5)
    with refused(r"weights\.safetensors"):
        live(tmp_path, resume=str(newest))
    live(tmp_path, resume="auto", quiet=False)
    words = said()
    assert "skipped" in words and "continues after step 4" in words and verify(newest) is None
    for step in (4, 5):
        damaged(tmp_path, step)
    with refused(r"cannot be continued.*step_000005.*--overwrite"):
        live(tmp_path, resume="auto")
    assert (tmp_path / "model").exists()


def test_a_continuation_with_other_settings_is_refused_and_changes_nothing(tmp_path):
    live(tmp_path)
    (tmp_path / "config.json").unlink()  # the checkpoint knows the settings too
    before = bytes_of(tmp_path)
    for options, words in (
        ({"task": "sorting"}, "task: 'counting', now 'sorting'"),
        ({"maker": Provenance({"tokenizer": "abc"})}, r"otherwise: tokenizer: .* now 'abc'\. C"),
        ({"maker": Provenance(processes=2)}, r"otherwise: processes: 1, now 2\."),
        ({"overwrite": True}, "give one of both"),
        ({"resume": "elsewhere\0"}, "checkpoint of the run in output_dir"),
    ):
        with refused(words):
            live(tmp_path, **{"resume": "auto"} | options)
        assert bytes_of(tmp_path) == before


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    counter = Counter()
    with stopped("After step 3 the weights are not finite"):
        live(
            tmp_path,
            lambda session: counter.weight.div_(3 - session.step),
            counter=counter,
            max_steps=3,
        )
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step_000002"
    assert not (tmp_path / "model").exists()


def test_minutes_between_checkpoints(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tokenrl.runs.checkpoint.time", SimpleNamespace(monotonic=lambda: now[0]))

    def wait(session):
        now[0] += 200.0  # seconds

    live(tmp_path, wait, max_steps=7, save_every=0, save_minutes=10.0, keep_checkpoints=9)
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_000003", "step_000006", "step_000007"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power failure may lose what was not flushed: files, and the folders they lie in."""
    flushed = set()
    parents = set()
    names = []
    fsync, rename = os.fsync, os.rename

    def state(path):
        return os.stat(path).st_ino, os.stat(path).st_mtime_ns

    def flush(handle):
        fsync(handle)
        flushed.add(state(handle))

    def check(source, target):
        assert {state(path) for path in (source, *source.rglob("*"))} <= flushed
        rename(source, target)
        parents.update(map(state, (target.parent, target.parent.parent)))
        names.append(target.name)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", check)
    live(tmp_path, keep_checkpoints=9)
    assert names == ["step_000002", "step_000004", "step_000005", "model"] and parents <= flushed


def test_a_reward_may_change_the_working_directory(workplace):
    ended = live("runs/a", lambda session: os.chdir("/"))
    assert ended.output_dir == workplace / "runs" / "a" and (ended.output_dir / "model").is_dir()


CPU_FULL = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(CPU_FULL), "There is not enough memory .* --micro-batch-size"),
        (torch.distributed.DistError(), "Another process of this run has ended"),
        (OSError(ENAMETOOLONG, "too long"), "This is longer than a file's name can be"),
    ],
)
def test_what_pytorch_and_the_system_say_is_one_paragraph(tmp_path, error, words):
    with stopped(f"At step 3: {words}.*step_000002"):
        live(tmp_path / "run", before=at(3, error))
    with refused(f"Before the first step: {words}"):
        live(tmp_path / "other", score=raising(error))


def test_runs_without_a_directory_are_numbered_and_end_with_commands(workplace, capsys):
    with pytest.raises(Killed):
        live(None, at(3, Killed()))
    assert live(None, resume="auto").output_dir == workplace / "runs/train-1"
    assert live(None, quiet=False).output_dir == workplace / "runs/train-2"
    assert read_json("runs/train-2/config.json")["output_dir"] == "runs/train-2"
    assert capsys.readouterr().out.endswith(
        "next    tokenrl sample --model runs/train-2\n"
        "next    tokenrl train --config runs/train-2 --seed 1\n"
    )
    second = live(None, accelerator=second_process({2: [7, 0]}), max_steps=0)
    assert second.output_dir == workplace / "runs/train-7"  # the number that the main process took


def test_the_next_commands_follow_from_the_kind_of_run_and_its_end():
    run = ("runs/my run", 0)
    finished = {"exit_reason": "finished"}
    commands = {"control": "advise --run", "reward-model": "train --task TASK --reward"}
    for kind, words in commands.items():
        first, again = next_commands(kind, *run, finished, True)
        assert first.startswith(f"tokenrl {words} 'runs/my run'")
        assert again == f"tokenrl {kind} --config 'runs/my run' --seed 1"
    flagged = finished | {"flags": ("nothing-learnt",)}
    assert next_commands("train", *run, flagged, False) == ["tokenrl advise --run 'runs/my run'"]
    stopped = next_commands("train", *run, {"exit_reason": "SIGTERM"}, True)
    assert stopped == ["tokenrl train --config 'runs/my run' --resume auto"]


def test_the_patience_of_a_run_begins_when_the_policy_learns():
    args = SimpleNamespace(keep="last", best_metric=None, patience=1, value_warmup=4)
    best = Best(args)
    exhausted = []
    for step in (0, 4, 8):
        best.judge(step, {"reward": 0.5})
        exhausted.append(best.exhausted)
    assert exhausted == [False, False, True]


def test_no_run_takes_the_attention_of_cudnn_whatever_user_code_sets_and_the_program_has_it_again(
    tmp_path,
):
    cuda, seen = torch.backends.cuda, []

    def note(session):
        seen.append(cuda.cudnn_sdp_enabled())
        with user_code():
            cuda.enable_cudnn_sdp(True)

    for before in (True, False):
        cuda.enable_cudnn_sdp(before)
        live(tmp_path / str(before), note)
        assert cuda.cudnn_sdp_enabled() == before
    cuda.enable_cudnn_sdp(True)
    assert seen and not any(seen)


def test_rounding_makes_no_evaluation_better():
    best = Best(Settings(patience=1, keep="best"))
    for step, reward in enumerate((0.3, 0.1 + 0.2)):
        best.judge(step, {"reward": reward})
    assert best.exhausted and best.until() == 0
