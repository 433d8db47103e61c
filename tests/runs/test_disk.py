"""A disk that is full and a directory that is gone: one paragraph, and what was there before stays whole."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress

import pytest
import torch
from folders import read_json
from refusals import stopped

from tests.runs.test_session import Counter, live
from tokenrl.files import verify


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only a system that mounts has a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk, kibibytes):
    """Leave so many kibibytes free."""
    (disk / "filler").unlink(missing_ok=True)
    with suppress(OSError):  # a run that writes meanwhile may have filled it already
        (disk / "filler").write_bytes(
            bytes(max(0, shutil.disk_usage(disk).free - 1024 * kibibytes))
        )


@pytest.fixture
def large(monkeypatch):
    """Make the model of the counting training 1 MB large."""

    def begin(self):
        self.number, self.weight, self.moment = 0, torch.zeros(250_000), torch.zeros(1)

    monkeypatch.setattr(Counter, "__init__", begin)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_fills_up_leaves_a_checkpoint_from_which_the_run_continues(
    disk, tmp_path, large
):
    """A continuation needs no more room than the run's own checkpoints leave it."""

    def at_step(session):
        if session.step == 3:
            fill(disk, 700)

    with stopped(
        r"At step 4: .*step_000004 could not be .*No space left.*step_000002; --resume auto continues from it"
    ):
        live(disk / "run", at_step)
    assert read_json(disk / "run" / "summary.json")["exit_reason"] == "failed"
    assert not [name for name in names(disk) if ".partial" in name]
    verify(disk / "run" / "checkpoints" / "step_000002")
    fill(disk, 2600)
    ended = live(disk / "run", resume="auto")
    assert (ended.exit_reason, ended.steps) == ("finished", 5)
    live(tmp_path / "whole")
    for name in ("metrics.jsonl", "model/weights.safetensors"):
        assert (disk / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_report_that_cannot_be_drawn_costs_nothing_else(tmp_path, capsys, monkeypatch):
    def report(run):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokenrl.runs.session.report_from_directory", report)
    ended = live(tmp_path, quiet=False)
    assert ended.exit_code == 0 and (tmp_path / "model").is_dir()
    assert read_json(tmp_path / "summary.json")["exit_reason"] == "finished"
    text = "".join(capsys.readouterr().out.split())
    assert "warning:Noreportcouldbemade" in text and f"tokenrlreport{tmp_path}" in text


@pytest.mark.parametrize(
    "gone", [shutil.rmtree, lambda path: path.rename(path.with_name("elsewhere"))]
)
def test_a_directory_that_is_gone_stops_the_run_and_is_not_made_again(tmp_path, gone):
    def at_step(session):
        if session.step == 3:
            gone(tmp_path / "run")

    with stopped(r"could not be written .* where it is until"):
        live(tmp_path / "run", at_step)
    assert not (tmp_path / "run").exists()
