"""Experiment trackers: found or refused by name, told everything, and never the end of a run."""

from unittest.mock import MagicMock, call

import pytest
from accelerate import tracking
from folders import read_json
from refusals import refused

from tests.runs.test_session import live


@pytest.fixture
def trackers(monkeypatch):
    """Classes of trackers by the names `fake` and `other`, and under a few names of real ones."""
    fake, second = (MagicMock(requires_logging_directory=False) for _ in range(2))
    classes = {"fake": fake, "other": second, "wandb": fake, "mlflow": fake}
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", tracking.LOGGER_TYPE_TO_CLASS | classes)
    monkeypatch.setattr(tracking, "_available_trackers", list(classes))
    return classes


def logged(kind):
    """The step and the numbers of each record that the trackers of a class got."""
    return [
        (record.kwargs["step"], record.args[0]) for record in kind.return_value.log.call_args_list
    ]


def test_a_tracker_gets_settings_steps_evaluations_and_timings(trackers, tmp_path):
    def end(session):  # so that it is evaluated after its last row
        if session.step == 3:
            session.end("stuck")

    fake = trackers["fake"]
    live(tmp_path / "none", report_to=("none",))
    live(tmp_path / "run", end, report_to=("fake", "fake"))
    assert fake.call_args_list == [call("tokenrl")]
    (config,) = fake.return_value.store_init_configuration.call_args.args
    assert config["estimator.baseline"] == "rloo" and config["report_to"] == '["fake", "fake"]'
    assert config["title"] == "counting" and config["kind"] == "train"
    assert {type(value) for value in config.values()} <= {type(None), bool, int, float, str}
    steps, records = zip(*logged(fake), strict=True)
    assert steps == (0, 1, 2, 3, 3)
    assert records[0] == {"eval_reward": 0.0} and records[-1] == {"eval_reward": 30.0}
    assert records[2]["eval_reward"] == 20 and records[2]["seconds"] == 1
    assert records[2]["step_seconds"] > 0 and records[1]["peak_memory_gib"] > 0.01
    assert "kl" not in records[1]  # inf: not a number to plot
    assert fake.return_value.finish.call_count == 1
    assert "peak_memory_gib" in (tmp_path / "run" / "timings.jsonl").read_text()
    assert "peak_memory_gib" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_one_that_fails_warns_once_and_leaves_the_run_and_the_others_alone(
    trackers, tmp_path, said, method
):
    fake, second = (trackers[name].return_value for name in ("fake", "other"))
    getattr(fake, method).side_effect = SystemExit("no network")
    live(tmp_path / "run", report_to=("fake", "other"), quiet=False)
    text = said()
    assert text.count("tracker fake failed (SystemExit: no network)") == 1
    assert "tracker other" not in text
    assert read_json(tmp_path / "run" / "summary.json")["exit_reason"] == "finished"
    assert getattr(fake, method).call_count == 1
    assert second.log.call_count == 7 and second.finish.call_count == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("fak",), r"report_to was given as 'fak'.*Did you mean 'fake'"),
        (("comet_ml",), "a tracker of accelerate whose package is installed"),
    ],
)
def test_one_that_is_missing_is_refused_before_the_directory_is_made(
    trackers, tmp_path, names, words
):
    with refused(words):
        live(tmp_path / "run", report_to=names)
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_one_run_in_the_directory_also_after_it_was_replaced(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (4, 3):
        live(tmp_path, report_to=("tensorboard",), max_steps=steps, overwrite=True)
    recorded = events.EventAccumulator(str(tmp_path / "tensorboard"))
    recorded.Reload()
    rewards = [(scalar.step, scalar.value) for scalar in recorded.Scalars("reward")]
    assert rewards == [(1, 1), (2, 3), (3, 6.5)]
    assert [scalar.step for scalar in recorded.Scalars("eval_reward")] == [0, 2, 3]
