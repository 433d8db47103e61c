"""Tasks whose own code raises: one paragraph, and nothing is trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from refusals import refused

from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import PromptTask, find_task, own_task

ROWS = [{"prompt": "a"}]

FILE = """
import sys

class Task:
    name, reward = "mine", "exact_match"
    eval_prompts = [{"prompt": "a"}]

    @property
    def train_prompts(self):
        RAISES

def make():
    RAISES

read = Task()
"""


@pytest.mark.parametrize("raises", ["sys.exit(0)", "raise OSError('no')"])
@pytest.mark.parametrize("name", ["make", "read"])
def test_so_is_one_in_a_file(workplace, refusal, name, raises):
    (workplace / "mine.py").write_text(FILE.replace("RAISES", raises))
    error = refusal("train --task", f"mine.py:{name}", "--output-dir", "run", "--quiet")
    assert f"task 'mine.py:{name}' was read: it raised " in error and "(mine.py, line" in error
    assert not (workplace / "run").exists()


class Notes:
    """An environment in TRL's interface that asks for a column."""

    def reset(self, prompt, note):
        return None

    def get_reward(self):
        return 0.0


def test_a_column_that_most_rows_of_a_task_lack_is_none_for_rewards_and_environments():
    def note_of(completions, note):
        return [0.0 if text is None else 1.0 for text in note]

    plain = [{"prompt": "a"}, {"prompt": "b"}]
    noted = [*plain, {"prompt": "c", "note": "n"}]
    for task in (PromptTask("t", noted, plain, note_of), {"train": plain, "test": noted}):
        read, rewards = find_task(TaskArguments(task=task, reward=(note_of,), environment=Notes))
        notes = [row["note"] for row in (*read.train_prompts, *read.eval_prompts)]
        assert sorted(map(str, notes)) == ["None"] * 4 + ["n"]
        assert rewards.environments.reset(read.train_prompts[:1], [0])[0].failure == ""


def test_of_an_object_that_is_no_task_of_the_package_four_attributes_are_read():
    others = {"train": print, "build": print, "base": 1}
    four = {"name": "t", "train_prompts": ROWS, "eval_prompts": [{"prompt": "b"}], "reward": len}
    read = own_task(SimpleNamespace(**four, **others))
    assert read == own_task(PromptTask(**four)) and read.reward is len
    with refused("SimpleNamespace with environment, solved, which only a tokenrl.PromptTask may"):
        own_task(SimpleNamespace(**four, solved=1, environment=print))
