"""Threads of whole runs: chosen once, said, recorded, used for sampling and training apart, put back."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import make_policy

import tokenrl
from tokenrl.cli import main
from tokenrl.language.rollout import generator
from tokenrl.language.training import collect, threads, update
from tokenrl.runs.threads import Choice, using_threads

TASK = ["--task", "sort_digits", "--prompts-per-step", "2", "--num-generations", "8", "--max-steps", "1"]
SMALL_RUN = [*TASK, "--eval-size", "4", "--eval-generations", "1", "--cpu"]


@pytest.fixture
def three_threads(monkeypatch):
    """As many as torch uses before a run; no environment variable decides, and the models count as tiny."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("tokenrl.runs.threads.FEW", 600_000)
    with using_threads(3):
        yield


@pytest.fixture
def seen(monkeypatch):
    """With how many threads each stage runs."""
    found = {"sampling": set(), "training": set()}

    def watch(stage, module, name):
        function = getattr(module, name)

        def watched(*args, **options):
            found[stage].add(torch.get_num_threads())
            return function(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch("sampling", generator, "_decode")
    watch("training", update, "_step_optimizer")
    return found


def measured(monkeypatch, **numbers):
    """Let the measurement find these numbers; returns the stages that were measured."""
    asked = []

    def choose(work, parameters, given=None):
        if given is not None:
            return Choice(given, "as set")
        asked.append(work.__name__)
        return Choice(numbers[work.__name__], "measured: 3 ms with 1", True)

    monkeypatch.setattr(threads, "choose_threads", choose)
    return asked


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def recorded(path):
    config = json.loads((path / "config.json").read_text())
    return config["sampling_threads"], config["training_threads"]


def test_a_run_chooses_records_says_and_repeats_its_threads(
    tmp_path, monkeypatch, capsys, three_threads, seen
):
    asked = measured(monkeypatch, sampling=1, training=2)
    assert main(["train", *SMALL_RUN, "--output-dir", str(tmp_path / "a")]) == 0
    line = "threads 1 for sampling (measured: 3 ms with 1), 2 for training (measured: 3 ms with 1)"
    assert line in said(capsys) and asked == ["sampling", "training"]
    assert recorded(tmp_path / "a") == (1, 2) and torch.get_num_threads() == 3
    assert seen == {"sampling": {1}, "training": {2}}

    again = measured(monkeypatch, sampling=7, training=7)  # a busier machine would find something else
    config = ["--config", str(tmp_path / "a"), "--output-dir", str(tmp_path / "b")]
    assert main(["train", *config]) == 0
    assert again == [] and recorded(tmp_path / "b") == (1, 2)
    assert "threads 1 for sampling (as set), 2 for training (as set)" in said(capsys)
    assert seen == {"sampling": {1}, "training": {2}}


def test_a_tiny_model_gets_one_thread_and_the_variable_wins(tmp_path, monkeypatch, capsys, three_threads):
    assert main(["train", *SMALL_RUN, "--check", "--output-dir", str(tmp_path)]) == 0
    assert "threads 1 for sampling and training (more are no use to 528,256 parameters)" in said(capsys)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["train", *SMALL_RUN, "--check", "--output-dir", str(tmp_path)]) == 0
    assert "threads 3 for sampling and training (OMP_NUM_THREADS)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_number_is_put_back_when_a_run_fails(tmp_path, monkeypatch, three_threads):
    monkeypatch.setattr(collect, "reward_rows", lambda *a, **k: 1 / 0)
    monkeypatch.setattr("tokenrl.language.training.step.reward_rows", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenrl.train(task="sort_digits", output_dir=tmp_path, quiet=True, cpu=True, eval_size=4,
                      sampling_threads=1, training_threads=2)  # fmt: skip
    assert torch.get_num_threads() == 3


def test_the_other_trainings_record_them_too(tmp_path, three_threads, capsys):
    command = ["sft", "--task", "sort_digits", "--max-steps", "1", "--output-dir", str(tmp_path / "s")]
    assert main(command) == 0
    assert json.loads((tmp_path / "s" / "config.json").read_text())["training_threads"] == 1
    assert "threads 1 for training (" in said(capsys)
    pairs = ["--num-pairs", "40", "--eval-size", "10", "--max-steps", "1", "--batch-size", "4"]
    command = ["reward-model", "--task", "sort_digits", *pairs, "--output-dir", str(tmp_path / "r")]
    assert main([*command, "--training-threads", "2"]) == 0
    assert recorded(tmp_path / "r") == (1, 2) and torch.get_num_threads() == 3
    line = "threads 1 for sampling (more are no use to 528,256 parameters), 2 for training (as set)"
    assert line in said(capsys)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_timed_is_the_model_itself_and_leaves_it_as_it_was(architecture, monkeypatch, three_threads):
    policy = make_policy(architecture)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    timed = []
    monkeypatch.setattr(
        threads, "choose_threads", lambda work, *_: timed.append(work()) or Choice(1, "measured", True)
    )
    torch.manual_seed(5)
    following = torch.rand(1)
    torch.manual_seed(5)
    found = threads.stage_threads(policy, None, "sampling", "training")
    assert list(found) == ["sampling", "training"] and timed[0].mask.all() and len(timed) == 2
    assert torch.equal(torch.rand(1), following) and torch.get_num_threads() == 3
    for name, parameter in policy.model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_a_command_without_settings_says_what_it_measured(monkeypatch, three_threads):
    policy, lines = make_policy(), []
    assert threads.announced_threads(policy, "sampling", lines.append) == 1 and lines == []
    measured(monkeypatch, sampling=2)
    assert threads.announced_threads(policy, "sampling", lines.append) == 2
    assert lines == ["threads: 2 for sampling (measured: 3 ms with 1)"]


def test_nothing_is_chosen_where_the_model_is_on_no_cpu():
    policy = make_policy()
    policy.model.to("meta")
    assert threads.stage_threads(policy, None, "sampling", "training") == {}
    assert threads.announced_threads(policy, "sampling", pytest.fail) is None
