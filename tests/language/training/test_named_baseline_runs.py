"""A baseline or an engine given by its name on the command line: a whole run, and its config.json."""

from __future__ import annotations

import json

import pytest
from command_line import completes
from folders import read_json, write_rows

from tokenrl.cli import main

FILE = """
import torch
def half(totals, group_size, mask, valid):
    return torch.full_like(totals, 0.5)
def fails(totals, **rows):
    raise ValueError("no idea")
def level(totals, level, prompt, entropy, ref_logprobs):
    assert all(isinstance(text, str) for text in prompt) and entropy.shape == ref_logprobs.shape
    return torch.tensor(level)
def misnamed(totals, levels):
    return totals
class Memory:
    def __init__(self):
        open("made.txt", "a").write("made ")
    def read(self, keys):
        return torch.zeros(len(keys))
    def update(self, keys, rewards):
        pass
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass
class Speechless(Memory):
    def read(self, keys):
        return None
def engine(policy, rows_at_once):
    from tokenrl.language import TransformersGenerator
    open("engine.txt", "a").write(str(rows_at_once))
    return TransformersGenerator(policy, rows_at_once)
"""
REWARD = "def share(completions, **_): return [text.count('a') / 9 for text in completions]\n"
QUICK = """train --task rows.jsonl --reward paid.py:share --cpu --quiet --max-steps 2 --prompts-per-step 2
--num-generations 2 --eval-size 2 --save-every 2 --max-completion-length 6 --threads 1"""
AGENT = "control --output-dir run --num-envs 4 --max-steps 1 --eval-episodes 2 --quiet --overwrite"


def baseline_of(run):
    return read_json(run / "config.json")["estimator"]["baseline"]


@pytest.fixture
def train(saved, workplace):
    (workplace / "mine.py").write_text(FILE)
    (workplace / "paid.py").write_text(REWARD)
    rows = [
        {"prompt": word, "level": 0.5}
        for word in ("the cat", "a dog", "the mat", "on", "the log", "sat")
    ]
    write_rows(workplace / "rows.jsonl", rows)
    defaults = [*QUICK.split(), "--model", str(saved()), "--output-dir"]
    return lambda folder, *flags: main([*defaults, folder, *flags])


def test_a_run_with_a_named_baseline_repeats_and_is_that_of_the_function(train, tmp_path):
    named = ("--estimator.baseline", "mine.py:half")
    constant = ("--estimator.baseline", "constant", "--estimator.baseline-constant", "0.5")
    assert train("same", *constant) == 0
    assert train("run", *named, "--generator", "mine.py:engine") == 0
    assert baseline_of(tmp_path / "run") == "mine.py:half"
    completes("train --config run --output-dir again")
    assert (tmp_path / "engine.txt").read_text() == "NoneNone"  # once a run
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "same", "again")]
    assert texts[0] == texts[1] == texts[2]


def test_a_function_reads_columns_of_the_data_and_the_reference_without_a_kl(train, tmp_path):
    """The same run as with a constant, in which a reference is scored."""
    constant = ("--estimator.baseline", "constant", "--estimator.baseline-constant", "0.5")
    assert train("same", *constant) == 0
    assert train("run", "--estimator.baseline", "mine.py:level") == 0
    rows = []
    for name in ("run", "same"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows.append(json.loads(lines[-1]))
    assert rows[0]["eval_reward_greedy"] == rows[1]["eval_reward_greedy"]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-2) and "kl" not in rows[1]
    assert {name: x for name, x in rows[0].items() if not name.startswith("kl")} == rows[1]


def test_a_memory_of_ones_own_is_made_once_per_run(train, tmp_path):
    assert train("run", "--estimator.baseline", "mine.py:Memory") == 0
    assert (tmp_path / "made.txt").read_text() == "made "
    completes(AGENT, "--estimator.baseline", "mine.py:Memory")
    assert (tmp_path / "made.txt").read_text() == "made made "


def test_what_cannot_be_used_is_refused_before_the_run(train, tmp_path, capsys):
    for spec, words in (
        (
            "mine.py:fails",
            "run: The baseline 'mine.py:fails' failed: it raised ValueError: no idea",
        ),
        ("mine.py:misnamed", "has a parameter 'levels' that is no column of the data"),
        ("mine.py:Speechless", "must return a tensor of 2 finite numbers from read"),
        ("nowhere.py:half", "there is no file nowhere.py"),
        ("mine.py", "module:function or path/to/file.py:function"),
    ):
        assert train("run", "--estimator.baseline", spec) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run" / "config.json").exists()
    assert train("run", "--generator", "mine.py:engin") == 2
    assert "Did you mean 'engine'" in capsys.readouterr().err
    for spec, code in (("mine.py:half", 0), ("mine.py:halv", 2)):  # an agent takes it too
        assert main([*AGENT.split(), "--estimator.baseline", spec]) == code
    assert "Did you mean 'half'" in capsys.readouterr().err
    assert baseline_of(tmp_path / "run") == "mine.py:half"
    assert main([*AGENT.split(), "--estimator.baseline", "mine.py:misnamed"]) == 1
    assert "At step 1: The baseline 'mine.py:misnamed' has a parameter" in capsys.readouterr().err
