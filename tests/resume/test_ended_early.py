"""A run of each kind that a signal ends, and that goes on, ends as if no signal had come."""

from __future__ import annotations

import signal
from contextlib import contextmanager

import pytest
from command_line import completes
from folders import read_json
from killing import REWARD, equal, left

from tokenrl.cli import main
from tokenrl.runs.session import Session

BEST = "--eval-every 2 --keep best --patience 2 --save-every 3 --quiet"
ROWS = f"--model model --max-steps 12 --threads 1 {BEST}"
SAMPLED = f"{ROWS} --task rows.jsonl --eval-size 4 --reward rewards.py:sorted_digits"
KINDS = {
    "train": f"train {SAMPLED} --prompts-per-step 2 --num-generations 2 --learning-rate 0.01 "
    "--max-completion-length 8",
    "sft": f"sft {SAMPLED} --batch-size 4 --best-metric reward",
    "reward-model": f"reward-model {ROWS} --data rows.jsonl --eval-size 8 --batch-size 4",
    "control": f"control --env CartPole-v1 --max-steps 12 --num-envs 2 --eval-episodes 2 {BEST}",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_decides_neither_the_best_weights_nor_the_end(kind, files, workplace, monkeypatch):
    """In a step without an evaluation, and in one with one."""
    (workplace / "rewards.py").write_text(REWARD)
    for name in ("model", "rows.jsonl"):
        (workplace / name).symlink_to(files / name)
    argv = [*KINDS[kind].split(), "--resume", "auto", "--output-dir"]
    completes(*argv, "whole")
    number = 2 if kind in ("train", "control") else 1
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
