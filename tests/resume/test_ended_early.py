"""A run that a signal ends and that goes on ends as if no signal had come; other kinds are in their rooms.

Two processes end together where code of the user's ends the run in one of them.
"""

from __future__ import annotations

import signal
from contextlib import contextmanager

import pytest
from command_line import completes
from folders import read_json
from killing import REWARD, TRAIN, equal, left

from tokenrl.cli import main
from tokenrl.runs.session import Session

BEST = "--eval-every 2 --keep best --patience 2 --save-every 3 --quiet"
ROWS = f"--model model --max-steps 12 --threads 1 {BEST}"
SAMPLED = f"{ROWS} --task rows.jsonl --eval-size 4 --reward rewards.py:sorted_digits"
KINDS = {
    "sft": f"sft {SAMPLED} --batch-size 4 --best-metric reward",
    "reward-model": f"reward-model {ROWS} --data rows.jsonl --eval-size 8 --batch-size 4",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_decides_neither_the_best_weights_nor_the_end(kind, files, workplace, monkeypatch):
    """In a step without an evaluation, and in one with one."""
    (workplace / "rewards.py").write_text(REWARD)
    for name in ("model", "rows.jsonl"):
        (workplace / name).symlink_to(files / name)
    argv = [*KINDS[kind].split(), "--resume", "auto", "--output-dir"]
    completes(*argv, "whole")
    number = 2 if kind == "sft" else 1
    with monkeypatch.context() as patch:
        signalled(patch, number)
        assert main([*argv, "run"]) == 143
    summary = read_json(workplace / "run" / "summary.json")
    assert summary["steps"] == number and bool(summary["eval_after"]) == (number == 2)
    completes(*argv, "run")
    equal(left(workplace / "run"), left(workplace / "whole"))


def signalled(patch, number):
    """Send this process a signal to end in the update of a step."""
    update = Session.update

    @contextmanager
    def ending(session):
        with update(session):
            yield
        if session.step == number:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(Session, "update", ending)


FINISHES = """
import os
import tokenrl

def in_one(completions, trainer_state, **_):
    if trainer_state.global_step == 2 and os.environ["RANK"] == "1":
        raise tokenrl.Finished("the second one has enough")
    return [len(set(completion)) % 2 for completion in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["dapo", "remax"])
def test_processes_end_together_where_one_has_enough(nursery, estimator):
    """Also where they exchange which groups are replaced, or reward greedy completions too."""
    (nursery.folder / "finishes.py").write_text(FINISHES)
    argv = TRAIN.replace("rewards.py:sorted_digits", "finishes.py:in_one").split()
    ended = nursery.run_all(
        [*argv, "--estimator", estimator, "--output-dir", estimator], processes=2
    )
    assert [process["code"] for process in ended] == [0, 0], nursery.log.read_text()[-2000:]
    summary = read_json(nursery.folder / estimator / "summary.json")
    assert (summary["reason"], summary["steps"]) == ("the second one has enough", 2)
