"""Experiment trackers: found or refused by name, told everything, and never the end of a run."""

import json
from unittest.mock import MagicMock, call

import pytest
from accelerate import tracking

from tests.runs.test_session import at, live
from tokenrl.errors import Refused, Stopped


@pytest.fixture
def fake(monkeypatch):
    """Classes of trackers by the names `fake` and `other`, and under a few names of real ones."""
    made = {kind: MagicMock(requires_logging_directory=False) for kind in ("fake", "other")}
    for kind in ("fake", "other", "wandb", "mlflow"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind, made.get(kind, made["fake"]))
    monkeypatch.setattr(tracking, "_available_trackers", [*tracking.LOGGER_TYPE_TO_CLASS])
    return made


def logged(kind):
    """What the trackers of a class were told of each step."""
    return [(told.kwargs["step"], told.args[0]) for told in kind.return_value.log.call_args_list]


def test_a_tracker_gets_settings_steps_evaluations_and_timings(fake, tmp_path):
    def ended(session):
        # so that it is evaluated after its last row
        session.ended = "stuck" if session.step == 3 else None

    live(tmp_path / "none", report_to=("none",))
    live(tmp_path / "mine", ended, report_to=("fake", "fake"))
    assert fake["fake"].call_args_list == [call("tokenrl")]
    ((config,), _) = fake["fake"].return_value.store_init_configuration.call_args
    assert config["estimator.baseline"] == "rloo" and config["report_to"] == '["fake", "fake"]'
    assert config["title"] == "counting" and config["kind"] == "train"
    assert all(
        value is None or isinstance(value, (bool, int, float, str)) for value in config.values()
    )
    told = logged(fake["fake"])
    assert [step for step, _ in told] == [0, 1, 2, 3, 3]
    assert told[0][1] == {"eval_reward": 0.0} and told[-1][1] == {"eval_reward": -1.0}
    assert (
        told[2][1]["eval_reward"] == 20
        and told[2][1]["seconds"] == 1
        and told[2][1]["step_seconds"] > 0
    )
    # inf: not a number to plot
    assert told[1][1]["peak_memory_gib"] > 0.01 and "kl" not in told[1][1]
    assert fake["fake"].return_value.finish.call_count == 1
    rows = [json.loads(line) for line in (tmp_path / "mine" / "timings.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[0]["peak_memory_gib"] > 0.01
    assert "peak_memory_gib" not in (tmp_path / "mine" / "metrics.jsonl").read_text()


def test_it_gets_every_so_many_steps_and_each_evaluation_and_ends_with_a_run_that_fails(
    fake, tmp_path
):
    live(tmp_path / "run", report_to=("fake",), logging_steps=3)
    assert [step for step, _ in logged(fake["fake"])] == [0, 2, 3, 4, 5]
    with pytest.raises(Stopped, match="It broke"):
        live(tmp_path / "fails", before=at(2, Stopped("It broke.")), report_to=("fake",))
    assert fake["fake"].return_value.finish.call_count == 2


@pytest.mark.parametrize("kind", [ConnectionError, SystemExit])
@pytest.mark.parametrize("when", ["at its start", "at step 0", "at its end"])
def test_one_that_fails_warns_once_and_leaves_the_run_and_the_others_alone(
    fake, tmp_path, capsys, when, kind
):
    tracker = fake["fake"].return_value
    broken = {"at its start": fake["fake"], "at step 0": tracker.log, "at its end": tracker.finish}[
        when
    ]
    broken.side_effect = kind("no network")
    live(tmp_path / "run", report_to=("fake", "other"), quiet=False)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("tracker fake failed") == 1 and "tracker other" not in said
    assert f"The tracker fake failed {when} ({kind.__name__}: no network)" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "finished"
    assert broken.call_count in (1, 2)  # a run that did not end is asked to end once more
    assert len(logged(fake["other"])) == 6 and fake["other"].return_value.finish.call_count == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("fak",), r"report_to was given as 'fak'.*Did you mean 'fake'"),
        (("none", "fake"), "report_to was given as none fake; none stands alone"),
        (
            ("fake", "comet_ml"),
            "'comet_ml', but that tracker is not installed: pip install comet-ml",
        ),
    ],
)
def test_one_that_is_missing_is_refused_before_the_directory_is_made(
    fake, tmp_path, monkeypatch, names, words
):
    monkeypatch.setattr(tracking, "_available_trackers", ["fake"])
    with pytest.raises(Refused, match=words) as caught:
        live(tmp_path / "run", report_to=names)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_project_and_name_reach_the_tracker_by_its_own_words(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    live(tmp_path / "mine", report_to=("wandb", "mlflow"))
    live(
        tmp_path / "mine",
        overwrite=True,
        report_to=("wandb",),
        tracker_project="ours",
        run_name="first",
    )
    expected = [
        call("theirs", name="mine"),
        call("tokenrl", run_name="mine"),
        call("ours", name="first"),
    ]
    assert fake["fake"].call_args_list == expected


def test_tensorboard_has_one_run_in_the_directory_also_after_it_was_replaced(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (4, 3):
        live(tmp_path, report_to=("tensorboard",), max_steps=steps, overwrite=True)
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(s.step, s.value) for s in found.Scalars("reward")] == [(1, 1), (2, 3), (3, 6.5)]
    assert [s.step for s in found.Scalars("eval_reward")] == [0, 2, 3]
    assert [s.value for s in found.Scalars("seconds")] == [1] * 3
