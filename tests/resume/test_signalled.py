"""Signals in the middle of everything: a run saves, exits with its code, and continues to the same end."""

from __future__ import annotations

from signal import SIGHUP, SIGINT, SIGTERM

import pytest
from folders import read_json
from killing import TRAIN, Moment, equal, left

pytestmark = pytest.mark.slow

PLACES = {
    "evaluation before the first step": ("language/evaluation/evaluation.py:evaluate", 1),
    "step": ("language/training/loop.py:_one_step", 4),
    "generation": ("language/rollout/batch.py:drawn", 80),
    "update": ("language/training/experience.py:loss_statistics", 5),
    "optimiser": ("language/training/learner.py:accepts", 4),
    "last evaluation": ("language/evaluation/evaluation.py:evaluate", 4),
    "completions": ("runs/metrics.py:write_completions", 3),
    "checkpoint": ("language/policy/saved.py:write", 2),
    "last checkpoint": ("language/policy/saved.py:write", 5),
    "model": ("language/policy/saving.py:text", 1),
    "report": ("runs/markup.py:write_page", 1),
}
AFTER_THE_OUTCOME = ("last checkpoint", "model", "report")
ARGV = [*TRAIN.split(), "--estimator", "rloo"]


def shown(code):
    """The exit code that a shell shows."""
    return 128 - code if code < 0 else code


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert nursery.run([*ARGV, "--output-dir", str(folder)]) == 0, nursery.said
    return left(folder)


@pytest.fixture
def signalled(nursery, whole, tmp_path):
    """`signalled(place, signal, ...)`: run to the first end, then to the last; return what the first left."""
    argv = [*ARGV, "--output-dir", str(tmp_path / "run"), "--resume", "auto"]

    def run(*what):
        moments = [
            Moment(*PLACES[place], signum)
            for place, signum in zip(what[::2], what[1::2], strict=True)
        ]
        code = shown(nursery.run(argv, *moments))
        file = tmp_path / "run" / "summary.json"
        summary = read_json(file) if file.exists() else {}
        model = (tmp_path / "run" / "model" / "model.safetensors").exists()
        assert nursery.run(argv) == 0, nursery.said
        equal(left(tmp_path / "run"), whole, nursery.said)
        return code, summary, model

    return run


@pytest.mark.parametrize(
    ("place", "number"),
    [(place, (SIGTERM, SIGINT, SIGHUP)[index % 3]) for index, place in enumerate(PLACES)],
    ids=str,
)
def test_a_signal_anywhere(signalled, place, number):
    code, summary, model = signalled(place, number)
    assert code == 128 + number and model
    assert summary["exit_reason"] == ("finished" if place in AFTER_THE_OUTCOME else number.name)
    assert (summary["steps"] == 9) == (place in ("last evaluation", *AFTER_THE_OUTCOME))


def test_a_second_request_to_end_changes_nothing(signalled):
    code, summary, model = signalled("optimiser", SIGTERM, "model", SIGTERM, "report", SIGTERM)
    assert (code, summary["exit_reason"], model) == (143, "SIGTERM", True)


@pytest.mark.parametrize(
    ("first", "second"),
    [(SIGINT, "optimiser"), (SIGTERM, "checkpoint"), (SIGINT, "model")],
    ids=str,
)
def test_a_second_interrupt_exits_at_once_and_what_was_there_stays_whole(signalled, first, second):
    code, summary, model = signalled("step", first, second, SIGINT)
    assert (code, summary, model) == (130, {}, False)
