"""Tasks whose own code raises: one paragraph, and nothing is trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from refusals import refused

from tokenrl import evaluate
from tokenrl.language.supervised.base import make_tiny
from tokenrl.language.supervised.defaults import demonstrations
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import PromptTask, find_task, load_task, own_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.settings import settle

ROWS = [{"prompt": "a"}]

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
    with refused("has no demonstrations"):
        demonstrations(load_task([{"prompt": "a", "completion": None}], reward=len))


@pytest.mark.parametrize("attribute", ["solved", "pass_threshold", "max_completion_length"])
def test_a_mark_of_a_task_is_a_number(attribute):
    task = PromptTask("t", [{"prompt": "a"}], [{"prompt": "b"}], len)
    setattr(task, attribute, "0.9")
    with refused(f"{attribute} is '0.9'; give a number, or None"):
        find_task(TaskArguments(task=task))


def test_a_task_may_call_something_else_than_settings_and_a_model_train_and_build():
    task = PromptTask("t", [{"prompt": "a"}], [{"prompt": "b"}], len)
    task.build = print
    policy = make_tiny(TrainArguments(model="tiny"), own_task(task))
    for attribute, steps in (
        ([{"prompt": "a"}], 200), (task.__init__, 200), ({0: task}, 200), ({"max_steps": 7}, 7)
    ):  # fmt: skip
        task.train = attribute
        result = settle(TrainArguments(model="tiny"), own_task(task), policy)
        assert result.args.max_steps == steps


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (SimpleNamespace(train_prompts=ROWS), "is a SimpleNamespace without name, eval_prompts: m"),
        (PromptTask("a", 5, ROWS), "it raised TypeError: 'int' object is not iterable"),
        (PromptTask("a", ["b"], ROWS), r"train_prompts, row 0 is 'b' \(str\); a row is a dict"),
        (lambda: 1 / 0, "task '<lambda>' was read, and it raised ZeroDivisionError"),
    ],
)
def test_an_object_that_is_no_task_is_refused_in_a_sentence(task, words):
    for use in (load_task, lambda task: evaluate(task=task, model="none")):
        with refused(words):
            use(task)
