"""Tasks whose own code raises: one paragraph, and nothing is trained."""

from __future__ import annotations

import pytest
from refusals import refused

from tokenrl.language.supervised.base import make_tiny
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import PromptTask, find_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.settings import train_settings

FILE = """
import sys

class Task:
    name, reward, max_completion_length = "mine", "exact_match", 4
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
    assert f"task 'mine.py:{name}' was read, and it raised " in error and "(mine.py, line" in error
    assert not (workplace / "run").exists()


def test_a_column_that_rows_of_a_task_lack_is_none_for_a_reward_whatever_rows_it_is_called_with():
    seen = []

    def note_of(completions, note, **columns):
        seen.extend(note)
        return [0.0] * len(completions)

    plain = [{"prompt": "a"}, {"prompt": "b"}]
    for parts in (
        ([*plain, {"prompt": "c", "note": "n"}], plain),
        (plain, [{"prompt": "c", "note": "n"}]),
    ):
        _, rewards = find_task(TaskArguments(task=PromptTask("t", *parts, note_of)))
        rewards(["a", "b"], ["x", "y"], [[0], [0]], {})
        rewards(["c"], ["x"], [[0]], {"note": ["n"]})
    assert seen == [None, None, "n"] * 2


@pytest.mark.parametrize("attribute", ["solved", "pass_threshold", "max_completion_length"])
def test_a_mark_of_a_task_is_a_number(attribute):
    task = PromptTask("t", [{"prompt": "a"}], [{"prompt": "b"}], len)
    setattr(task, attribute, "0.9")
    with refused(f"{attribute} is '0.9'; give a number, or None"):
        find_task(TaskArguments(task=task))


def test_a_task_may_call_something_else_than_settings_and_a_model_train_and_build():
    task = PromptTask("t", [{"prompt": "a"}], [{"prompt": "b"}], len)
    task.build = print
    policy = make_tiny(TrainArguments(model="tiny"), task)
    for attribute, steps in (([{"prompt": "a"}], 200), (task.__init__, 200), ({"max_steps": 7}, 7)):
        task.train = attribute
        assert train_settings(TrainArguments(model="tiny"), task, policy).args.max_steps == steps
