"""Output that cannot be written: a reader that has ended ends a command quietly, a lost place ends no run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command_line import completes
from folders import read_json

TRAIN = "control --env bandit --max-steps 8 --logging-steps 1 --save-every 1 --output-dir"


def command(words, shell):
    """Run a command in a shell that says where its output goes."""
    line = shell.format('"$PYTHON" -m tokenrl ' + words)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )


@pytest.mark.parametrize("unbuffered", ["", "PYTHONUNBUFFERED=1"])
def test_help_that_cannot_be_written_stops(unbuffered):
    done = command("train --help", unbuffered + " {} >/dev/full")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "tokenrl: The output could not be written ([Errno 28] No space left on"
    )


@pytest.mark.slow
def test_what_is_read_no_more_ends_quietly_and_a_run_is_saved(tmp_path):
    run = tmp_path / "run"
    done = command(f"{TRAIN} {run}", "PYTHONUNBUFFERED=1 {} | head -3")
    assert done.returncode == 141 and done.stderr == ""
    completes(f"{TRAIN} {run} --resume auto --quiet")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 9


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["{} >/dev/full", "{} >&- 2>&-", "PYTHONIOENCODING=ascii {}"])
def test_a_run_goes_on_where_its_output_is_lost(tmp_path, shell):
    done = command(f"{TRAIN} {tmp_path / 'run'}", shell)
    assert done.returncode == 0 and done.stderr == ""
    assert read_json(tmp_path / "run" / "summary.json")["exit_reason"] == "finished"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 9


def test_a_working_directory_that_was_deleted_is_refused(tmp_path, monkeypatch, refusal):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    (tmp_path / "x").rmdir()
    text = refusal("lab exact")
    assert text.count("\n") == 1 and "The current working directory cannot be used" in text
    completes("--version")


def test_what_an_error_says_cannot_change_the_terminal(workplace, refusal):
    text = refusal("report", "\x1b[31m")
    assert r"\x1b[31m" in text and "\x1b" not in text
