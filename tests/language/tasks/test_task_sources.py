"""Prompts from columns and templates, and imports by name, without a file of data."""

import pytest
from refusals import refused

from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.sources import DataArguments, TaskArguments, with_prompts
from tokenrl.language.tasks.task import PromptTask, find_task, load_task

ROWS = [{"question": f"q{i}", "hint": {"text": i}} for i in range(3)]


def read(rows):
    return Rows.of(rows)


def test_columns_and_templates():
    rows = with_prompts(read(ROWS), "here", DataArguments(prompt_column="question"))
    assert rows[1] == {"prompt": "q1", **ROWS[1]}
    template = DataArguments(prompt_template="{question} ({hint[text]}) {{}}\nAnswer:")
    rows = with_prompts(read(ROWS), "here", template)
    assert rows[2] == {"prompt": "q2 (2) {}\nAnswer:", **ROWS[2]}
    for template in ("{questoin}", "{}", "{question", "{hint[gone]}"):
        with refused("prompt_template"):
            with_prompts(read(ROWS), "here", DataArguments(prompt_template=template))


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_value_never_becomes_a_word_in_a_prompt(missing):
    with refused(f"prompt_template .* of row 3 .* column 'question' is {missing}"):
        rows = read([*ROWS, {"question": missing}])
        with_prompts(rows, "here", DataArguments(prompt_template="{question}"))


class Echo:
    """An environment with gymnasium's interface on text."""

    def reset(self, seed=None):
        return f"{seed}> ", {}

    def step(self, text):
        return "", float(len(text)), True, False, {}


def make_echo():
    """A function that makes one."""
    return Echo()


@pytest.fixture
def echo_file(tmp_path):
    (tmp_path / "env.py").write_text(
        "class Env:\n    def reset(self, seed=None): return '', {}\n"
        "    def step(self, text): return '', 1.0, True, False, {}\n"
        "def make(): return Env()\nFACTORIES = {'a': Env}\n"
    )
    return f"{tmp_path}/env.py"


@pytest.mark.parametrize("flag", ["task", "environment"])
@pytest.mark.parametrize("attribute", ["Env", "make"])
def test_an_environment_alone_is_a_task_of_empty_prompts(echo_file, flag, attribute):
    name = f"{echo_file}:{attribute}"
    args = TaskArguments(**{flag: name}, max_turns=3, malformed="observe")
    task, rewards = find_task(args)
    assert args.task == task.name == name and callable(task.environment)
    assert [*task.train_prompts, *task.eval_prompts] == [{"prompt": ""}] * (512 + 64)
    environments = rewards.environments
    assert (environments.max_turns, environments.malformed) == (3, "observe")
    assert environments.share_seed
    assert len(find_task(TaskArguments(**{flag: name}, eval_size=5))[0].eval_prompts) == 5
    chat = load_task(name, chat=True)
    assert chat.train_prompts[0] == {"prompt": [{"role": "user", "content": ""}]}


def test_an_environment_beside_data_takes_its_rows_and_needs_no_reward(echo_file):
    rows = [{"prompt": f"p{i}", "environment": "a"} for i in range(10)]
    for environment in (Echo, {"a": Echo}, f"{echo_file}:Env", f"{echo_file}:FACTORIES"):
        args = TaskArguments(task=rows, environment=environment, reward_timeout=2.0)
        task, rewards = find_task(args)
        assert len(task.train_prompts) == 8 and task.train_prompts[0]["environment"] == "a"
        assert rewards.environments.timeout == 2.0 and len(rewards.names) == 1
    mine = PromptTask("mine", rows, rows, [], environment=Echo)
    assert find_task(TaskArguments(task=mine))[0].environment is Echo
    other, _ = find_task(TaskArguments(task=mine, environment=make_echo))
    assert other.environment is make_echo and mine.environment is Echo
    with refused("is a dict without name"):  # no row of an empty prompt names one
        find_task(TaskArguments(environment=f"{echo_file}:FACTORIES"))
