"""Experiment trackers: found or refused by name, told everything, and never the end of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from accelerate import tracking, utils

from tokenrl import train_agent
from tokenrl.core import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.runs.reader import Outcome
from tokenrl.runs.session import Session
from tokenrl.runs.trackers import TrackerArguments


@dataclass(frozen=True)
class Arguments(TrackerArguments):
    estimator: Estimator = field(default_factory=Estimator)
    hidden: tuple[int, ...] = (8, 4)
    logging_steps: int = 1
    max_steps: int = 4


@pytest.fixture
def fake(monkeypatch):
    """Trackers by the names `fake` and `other`, which keep what they are told, or raise in `broken` calls."""
    told, broken = [], {}

    def make(kind):
        class Fake(tracking.GeneralTracker):
            name, requires_logging_directory = kind, False

            def __init__(self, project, **options):
                super().__init__()
                self.tell("init", project, options)

            def tell(self, call, *content):
                told.append((kind, call, *content))
                error = broken.get((kind, call))
                error = error(*content) if callable(error) else error
                if error is not None:
                    raise error

            @property
            def tracker(self):
                return self

            def start(self):
                self.tell("start")

            def store_init_configuration(self, values):
                self.tell("config", values)

            def log(self, values, step=None, **kwargs):
                self.tell("log", step, values)

            def finish(self):
                self.tell("finish")

        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind, Fake)

    make("fake"), make("other")
    return told, broken


def live(directory, *, steps=4, until=9, late=None, **options):
    """A whole run that is evaluated at step 3, and again after the last step if `late` is given."""
    with Session("train", directory, overwrite=True, tracking=Arguments(**options)) as session:
        session.open("counting", {})
        session.evaluated({"reward": 0.5})
        session.begin(Arguments(**options), names={}, title="counting")
        for step in session.steps(steps):
            if step == until:
                raise Stopped("It broke.")
            metrics = {"reward": float(step), "kl": float("nan")}
            if step == 3:
                metrics |= session.evaluated({"reward": 0.7})
            session.record(metrics, {"step_seconds": 0.25})
        if late is not None:
            session.evaluated({"reward": late})
        session.finish(Outcome(**session.outcome("finished")), lambda folder: None)


def calls(told, call, kind="fake"):
    return [content for name, what, *content in told if (name, what) == (kind, call)]


def test_a_tracker_gets_settings_steps_evaluations_and_timings(fake, tmp_path):
    told, _ = fake
    live(tmp_path / "none", report_to=("none",))
    live(tmp_path / "mine", report_to=("fake", "fake"), late=0.9)
    assert calls(told, "init") == [["tokenrl", {}]]
    ((config,),) = calls(told, "config")
    assert config["estimator.baseline"] == "rloo" and config["hidden"] == "[8, 4]"
    assert config["title"] == "counting" and config["kind"] == "train"
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in config.values())
    logged = calls(told, "log")
    assert [step for step, _ in logged] == [0, 1, 2, 3, 4, 4]
    assert logged[0][1] == {"eval_reward": 0.5} and logged[-1][1] == {"eval_reward": 0.9}
    assert logged[3][1]["eval_reward"] == 0.7 and logged[3][1]["step_seconds"] == 0.25
    assert logged[1][1]["peak_memory_gib"] > 0.01 and "kl" not in logged[1][1]  # nan: not a number to plot
    assert len(calls(told, "finish")) == 1
    rows = [json.loads(line) for line in (tmp_path / "mine" / "timings.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[0]["peak_memory_gib"] > 0.01
    assert "peak_memory_gib" not in (tmp_path / "mine" / "metrics.jsonl").read_text()


def test_it_gets_every_so_many_steps_and_each_evaluation(fake, tmp_path):
    live(tmp_path / "run", report_to=("fake",), logging_steps=2)
    assert [step for step, _ in calls(fake[0], "log")] == [0, 2, 3, 4]


@pytest.mark.parametrize("kind", [ConnectionError, SystemExit])
@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_one_that_fails_warns_once_and_leaves_the_run_and_the_others_alone(
    fake, tmp_path, capsys, call, kind
):
    told, broken = fake
    broken["fake", call] = kind("no network")
    live(tmp_path / "run", report_to=("fake", "other"))
    said = " ".join(capsys.readouterr().out.split())
    when = {"log": "at step 0", "finish": "at its end"}.get(call, "at its start")
    assert said.count("tracker fake failed") == 1 and "tracker other" not in said
    assert f"The tracker fake failed {when} ({kind.__name__}: no network)" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "finished"
    assert len(calls(told, call)) in (1, 2)  # a run that did not end is asked to end once more
    assert len(calls(told, "log", "other")) == 5 and len(calls(told, "finish", "other")) == 1


def test_a_run_that_fails_is_ended_in_the_trackers_too(fake, tmp_path):
    with pytest.raises(Stopped, match="It broke"):
        live(tmp_path / "run", report_to=("fake",), until=2)
    assert len(calls(fake[0], "finish")) == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("fak",), r"report_to was given as 'fak'.*Did you mean 'fake'"),
        (("none", "fake"), "report_to was given as none fake; none stands alone"),
        (("fake", "comet_ml"), "'comet_ml', but that tracker is not installed: pip install comet-ml"),
    ],
)
def test_one_that_is_missing_is_refused_before_the_directory_is_made(
    fake, tmp_path, monkeypatch, names, words
):
    monkeypatch.setattr(utils, "is_comet_ml_available", lambda: False)
    with pytest.raises(Refused, match=words) as caught:
        live(tmp_path / "run", report_to=names)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_project_and_name_reach_the_tracker_by_its_own_words(fake, tmp_path, monkeypatch):
    told, _ = fake
    for kind in ("wandb", "mlflow"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind, tracking.LOGGER_TYPE_TO_CLASS["fake"])
        monkeypatch.setattr(utils, f"is_{kind}_available", lambda: True)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    live(tmp_path / "mine", report_to=("wandb", "mlflow"))
    live(tmp_path / "mine", report_to=("wandb",), tracker_project="ours", run_name="first")
    assert calls(told, "init") == [
        ["theirs", {"name": "mine"}],
        ["tokenrl", {"run_name": "mine"}],
        ["ours", {"name": "first"}],
    ]


def test_tensorboard_has_one_run_in_the_directory_also_after_it_was_replaced(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (4, 3):
        live(tmp_path, report_to=("tensorboard",), steps=steps)
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(s.step, s.value) for s in found.Scalars("reward")] == [(1, 1), (2, 2), (3, 3)]
    assert [s.step for s in found.Scalars("eval_reward")] == [0, 3]
    assert [s.value for s in found.Scalars("step_seconds")] == [0.25] * 3


def test_an_agent_is_tracked_too(fake, tmp_path):
    train_agent(env="bandit", max_steps=2, eval_episodes=4, output_dir=tmp_path, quiet=True, report_to="fake",
                logging_steps=1)  # fmt: skip
    logged = calls(fake[0], "log")
    assert [step for step, _ in logged] == [0, 1, 2]
    assert {"reward", "step_seconds", "env_steps_per_second", "peak_memory_gib"} <= logged[1][1].keys()
