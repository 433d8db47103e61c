"""A disk that is full and a directory that is gone: one paragraph, and what was there before stays whole."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
import torch

from tests.runs.test_session import Counter, live
from tokenrl.errors import Stopped
from tokenrl.runs.folders import atomic_directory, verify
from tokenrl.runs.metrics import read_metrics


@contextmanager
def largest_file(size):
    """Let no file of this process grow beyond `size` bytes, as the system does; Python ignores SIGXFSZ."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("only a system that mounts has a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk, left):
    """Leave so many kibibytes free."""
    (disk / "filler").unlink(missing_ok=True)
    with suppress(OSError):  # a run that writes meanwhile may have filled it already
        (disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 1024 * left)))


@pytest.fixture
def large(monkeypatch):
    """Make the model of the counting training 1 MB large."""

    def begin(self):
        self.number, self.weight, self.moment = 0, torch.zeros(250_000), torch.zeros(1)

    monkeypatch.setattr(Counter, "__init__", begin)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: tensor.view(-1)[0].item())


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("writer", ["safetensors", "tokenizers", "transformers"])
def test_an_older_model_stays_whichever_writer_finds_the_disk_full(tmp_path, writer):
    """Each of them raises an error of another type."""
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"word{i}": i for i in range(500)}, "word0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    write = {
        "safetensors": Counter().write,
        "tokenizers": fast.save_pretrained,
        "transformers": GenerationConfig(**{f"name{i}": i for i in range(200)}).save_pretrained,
    }[writer]
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("older")
    with (
        largest_file(50),
        pytest.raises(Stopped, match=r"model could not be written .*File too large"),
        atomic_directory(tmp_path / "model") as folder,
    ):
        write(folder)
    assert names(tmp_path) == ["model/a", "model/manifest.json"] and os.listdir(tmp_path) == ["model"]


def test_a_disk_that_fills_up_leaves_a_checkpoint_from_which_the_run_continues(disk, tmp_path, large):
    """A continuation needs no more room than the run's own checkpoints leave it."""

    def at_step(session):
        if session.step == 3:
            fill(disk, 700)

    with pytest.raises(Stopped, match=r"At step 4: .*step_000004 could not be .*No space left") as caught:
        live(disk / "run", at_step)
    said = str(caught.value)
    assert "step_000002; --resume auto continues from it" in said and "\n" not in said
    assert json.loads((disk / "run" / "summary.json").read_text())["exit_reason"] == "failed"
    assert not [name for name in names(disk) if ".partial" in name]
    verify(disk / "run" / "checkpoints" / "step_000002")
    fill(disk, 2600)
    ended = live(disk / "run", resume="auto")
    assert (ended.exit_reason, ended.steps) == ("finished", 5)
    live(tmp_path / "whole")
    for name in ("metrics.jsonl", "model/weights.safetensors"):
        assert (disk / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_report_that_cannot_be_drawn_costs_nothing_else(tmp_path, capsys):
    def report(run):
        raise OSError(28, "No space left on device")

    ended = live(tmp_path, lambda session: setattr(session.console.rich, "quiet", False), report=report)
    assert ended.exit_code == 0 and (tmp_path / "model").is_dir()
    assert json.loads((tmp_path / "summary.json").read_text())["exit_reason"] == "finished"
    said = "".join(capsys.readouterr().out.split())
    assert "warning:Noreportcouldbemade" in said and f"tokenrlreport{tmp_path}" in said


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda path: path.rename(path.with_name("elsewhere"))])
def test_a_directory_that_is_gone_stops_the_run_and_is_not_made_again(tmp_path, gone):
    def at_step(session):
        if session.step == 3:
            gone(tmp_path / "run")

    with pytest.raises(Stopped, match=r"could not be written .* removed or moved") as caught:
        live(tmp_path / "run", at_step)
    assert not (tmp_path / "run").exists() and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "reward-model", "sft"])
def test_a_training_whose_disk_fills_up_ends_in_one_paragraph(disk, command):
    arguments = [command, "--task", "sort_digits", "--max-steps", "60", "--output-dir", str(disk / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenrl", *arguments, "--quiet"], stderr=subprocess.PIPE, text=True
    )
    while not (disk / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.002)
    fill(disk, 64)
    _, errors = process.communicate()
    assert process.returncode == 1 and errors.count("\n") == 1, errors
    assert errors.startswith("tokenrl: At step ") and "No space left" in errors
    assert not [name for name in names(disk) if ".partial" in name]
    assert read_metrics(disk / "run" / "metrics.jsonl")
