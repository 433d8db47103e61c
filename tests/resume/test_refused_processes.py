"""Two processes that were started in different ways are refused at once, and the main one alone says why."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

TRAIN = """train --task digits.jsonl --reward rewards.py:sorted_digits --model warm --cpu --quiet --max-steps 2
--prompts-per-step 2 --num-generations 2 --eval-size 2 --max-completion-length 4 --output-dir"""
DIFFER = {
    "check": "--check",
    "model": "--model other",
    "resume": "--resume auto",
    "estimator": "--estimator ppo",
    "generator": "--generator vllm",
}
"""By the setting that the message names, the flag that one of the processes has."""
CASES = [(flag, "", name) for name, flag in DIFFER.items()]
CASES += [("", "--resume auto", "resume")]
CASES += [("--task digits.jsonl", "--task others.jsonl", "differ in task")]
REFUSED = {
    "--resume absent": "it must be auto or a checkpoint",
    "--task absent.jsonl": "there is no such file",
    "--task split.py:task": "differ in data",
}
"""By the flag of both processes, what the main one says."""
CASES += [(flag, flag, words) for flag, words in REFUSED.items()]
SPLIT = """
import os
from tokenrl import PromptTask

rows = [{"prompt": f"{os.environ['RANK']}{n}>"} for n in range(6)]
task = PromptTask("split", rows[:4], rows[4:], len)
"""


@pytest.mark.parametrize(("main", "other", "words"), CASES)
def test_processes_that_differ_in_anything_are_refused(nursery, tmp_path, main, other, words):
    """Both end with code 2."""
    (nursery.folder / "split.py").write_text(SPLIT)
    (nursery.folder / "others.jsonl").write_text((nursery.folder / "digits.jsonl").read_text())
    before = len(nursery.log.read_text())
    argv = [*TRAIN.split(), str(tmp_path / "run")]
    ended = nursery.run_all(argv, processes=2, of_rank=(main.split(), other.split()))
    printed = nursery.log.read_text()[before:]
    assert [process["code"] for process in ended] == [2, 2], printed
    assert words in " ".join(printed.split()) and printed.count("tokenrl: ") == 1, printed
    assert "Traceback" not in printed
