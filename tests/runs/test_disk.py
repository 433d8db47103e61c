"""A disk that is full and a directory that is gone: one paragraph, older files intact, no state lost."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from tests.runs.test_session import Counter, lines, live
from tokenrl.errors import Refused, Stopped
from tokenrl.runs.checkpoint import replace_directory, save_checkpoint, verify_checkpoint
from tokenrl.runs.files import write_json
from tokenrl.runs.metrics import MetricsLog, read_metrics, write_completions
from tokenrl.runs.space import check_space, in_words


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
    """A disk of 32 MB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("only a system that mounts has a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk, left):
    """Leave so many kibibytes free."""
    with contextlib.suppress(OSError):  # a run that writes meanwhile may have filled it already
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 1024 * left))


@pytest.fixture
def large(monkeypatch):
    """Make the model of the counting training 1 MB large."""

    def begin(self):
        self.number, self.weight = 0, torch.zeros(250_000)

    monkeypatch.setattr(Counter, "__init__", begin)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: tensor.view(-1)[0].item())


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path):
    with (
        MetricsLog(tmp_path / "m", tmp_path / "t") as log,
        largest_file(100),
        pytest.raises(Stopped, match=r"m could not be written \(OSError.*too large\)\. Free space"),
    ):
        for step in range(100):
            log.write(step, {"reward": 0.5}, {"seconds": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "m")] == [0, 1, 2]
    assert (tmp_path / "m").read_bytes().endswith(b'"reward": 0.5}\n')
    with MetricsLog(tmp_path / "m", tmp_path / "t") as log:  # with space again, it goes on
        log.write(3, {"reward": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path / "m")] == [0, 1, 2, 3]


def test_completions_and_json_leave_the_older_file(tmp_path):
    rows = [{"completion": os.urandom(200).hex()} for _ in range(20)]
    write_completions(tmp_path, 1, rows[:1])
    write_json(tmp_path / "a.json", {"a": 1})
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with largest_file(2000):
        with pytest.raises(Stopped, match=r"step_000001.parquet could not be written .*too large"):
            write_completions(tmp_path, 1, rows)
        with pytest.raises(Stopped, match=r"a.json could not be written"):
            write_json(tmp_path / "a.json", {"a": "a" * 3000})
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


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
    model = tmp_path / "model"
    replace_directory(model, lambda folder: (folder / "a").write_text("older"))
    with largest_file(50), pytest.raises(Stopped, match=r"model could not be written .*File too large"):
        replace_directory(model, write)
    assert names(tmp_path) == ["model/a"] and os.listdir(tmp_path) == ["model"]


def test_where_nothing_can_be_saved_the_failure_names_what_was_tried(tmp_path, temporary, large, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with largest_file(500_000), pytest.raises(Stopped) as caught:
        live(tmp_path / "run", save_every=2)
    said = str(caught.value)
    assert "The checkpoint of step 2 could not be saved" in said and "\n" not in said
    assert f"Nor could it be saved in {temporary}, {tmp_path / 'home'}" in said
    assert os.listdir(temporary) == [] and not list(tmp_path.rglob("step_*")) + list(
        tmp_path.rglob("tokenrl-*")
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "failed"
    assert [row["step"] for row in lines(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize(("left", "held", "rescued"), [(700, [], 1), (1500, [3], 1), (2500, [3, 5], 0)])
def test_a_disk_that_fills_up_leaves_a_state_from_which_the_run_continues(
    disk, tmp_path, temporary, large, left, held, rescued
):
    """What is left holds no checkpoint; one, but neither a further one nor the model; two, but no model."""

    def at_step(session):
        if session.step == 1:
            fill(disk, left)

    with pytest.raises(Stopped) as caught:
        live(disk / "run", at_step, save_every=3)
    said = str(caught.value)
    saved = list(temporary.glob("tokenrl-*/step_*"))
    assert len(saved) == rescued and all(str(path) in said for path in saved) and "\n" not in said
    shutil.copytree(disk / "run", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == [f"step_{step:06d}" for step in held]
    assert not (tmp_path / "run" / "model").exists()
    for path in saved:
        shutil.move(path, checkpoints)
    for path in checkpoints.iterdir():
        verify_checkpoint(path)
    ended = live(tmp_path / "run", resume="auto")
    assert (ended.exit_reason, ended.steps) == ("finished", 5) and (tmp_path / "run" / "model").is_dir()
    live(tmp_path / "whole")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


def test_a_report_that_cannot_be_drawn_costs_nothing_else(tmp_path, capsys):
    def narrow(session):
        session.console.rich.quiet = False
        if session.step == 5:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, most))

    with largest_file(resource.getrlimit(resource.RLIMIT_FSIZE)[1]):  # to put it back
        ended = live(tmp_path, narrow)
    assert ended.exit_code == 0 and (tmp_path / "model").is_dir() and not (tmp_path / "report.html").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["exit_reason"] == "finished"
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: No report could be made" in said and f"tokenrl report {tmp_path}" in said.replace(
        " /", " /"
    )


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda path: path.rename(path.with_name("elsewhere"))])
def test_a_directory_that_is_gone_stops_the_run_and_is_not_made_again(tmp_path, temporary, gone):
    def at_step(session):
        if session.step == 3:
            gone(tmp_path / "run")

    with pytest.raises(Stopped, match=r"metrics.jsonl could not be written .* removed or moved") as caught:
        live(tmp_path / "run", at_step, save_every=0)
    assert not (tmp_path / "run").exists() and "\n" not in str(caught.value)
    (saved,) = temporary.glob("tokenrl-*")
    assert f"The weights alone were saved as {saved} instead" in str(caught.value)
    assert load_file(saved / "weights.safetensors")["weight"].item() == 1 + 2 + 3  # step 3 was not recorded


def test_a_disk_that_is_full_before_the_first_step_leaves_nothing_elsewhere(disk, temporary):
    fill(disk, 4)
    with pytest.raises(Stopped, match=r"At step 0: .*metrics.jsonl could not be written .*No space left"):
        live(disk / "run")
    assert os.listdir(temporary) == []


def test_a_checkpoint_makes_no_run_directory(tmp_path):
    with pytest.raises(Stopped, match=r"step 1 could not be saved in \S+ \(FileNotFoundError"):
        save_checkpoint(tmp_path / "run" / "checkpoints", 1, Counter().write, keep=1)
    assert os.listdir(tmp_path) == []


def test_space_is_compared_with_what_is_free(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "not" / "there", free // 2)
    with pytest.raises(
        Refused, match=r"needs about \S+ \S+ in .*not/there .* are free there. Free space, lower"
    ):
        check_space(tmp_path / "not" / "there", 2 * free)
    sizes = {
        0: "0 bytes",
        999: "999 bytes",
        1000: "0.98 KiB",
        1536: "1.5 KiB",
        200 << 20: "200 MiB",
        5 << 40: "5 TiB",
    }
    assert {size: in_words(size) for size in sizes} == sizes


def test_a_run_that_the_disk_cannot_hold_is_refused_before_its_first_step(disk, large):
    fill(disk, 5000)
    with pytest.raises(Refused, match=r"needs about 9\.5 MiB in \S+ .* 4\.9 MiB are free there"):
        live(disk / "run")
    assert not (disk / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["{} >/dev/full", "{} | head -1", "{} >&- 2>&-"])
def test_a_training_goes_on_without_its_output(tmp_path, shell):
    code, _, errors = trained(tmp_path / "run", shell)
    assert code == 0 and errors.count("\n") == (0 if "2>" in shell else 1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "reward-model", "sft"])
@pytest.mark.parametrize("left", [0, 16, 64, 1024])
def test_a_training_whose_disk_fills_up_ends_in_one_paragraph(disk, tmp_path, command, left):
    code, _, errors = trained(disk / "run", "{} >/dev/null", command, left=left, TMPDIR=str(tmp_path))
    assert code == 1 and errors.count("\n") == 1, errors
    assert errors.startswith("tokenrl: At step ") and "No space left" in errors
    assert not [name for name in names(disk) if ".partial" in name]
    assert read_metrics(disk / "run" / "metrics.jsonl")
    found = list(tmp_path.glob("tokenrl-*"))
    assert len(found) == (left > 0)  # without any space, step 1 fails, after which there is little to save
    for saved in found:
        assert f"saved as {saved}" in errors and list(saved.rglob("model.safetensors"))
        for path in saved.glob("step_*"):
            verify_checkpoint(path)


@pytest.mark.slow
def test_space_for_the_model_is_enough_at_the_end(disk):
    code, output, errors = trained(disk / "run", "{}", left=3500)
    assert code == 0 and errors == ""
    assert "could not be saved" in " ".join(output.split()) and "model   " in output
    assert (disk / "run" / "model" / "model.safetensors").is_file()
    assert not list((disk / "run" / "checkpoints").iterdir())


def trained(run, shell, command="train", *, left=None, **environment):
    """Run a training in a shell that says where its output goes; fill the disk once it has begun."""
    steps = "4" if left is None else "60"
    arguments = [command, "--task", "sort_digits", "--max-steps", steps, "--output-dir", str(run)]
    line = shell.format(" ".join([sys.executable, "-m", "tokenrl", *arguments]))
    process = subprocess.Popen(
        ["bash", "-c", f"set -o pipefail; {line}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip
    if left is not None:
        while not (run / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.002)
        fill(run.parent, left)
    output, errors = process.communicate()
    return process.returncode, output, errors
