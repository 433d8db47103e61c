"""Prompts from columns and templates, and imports by name, without a file of data."""

import datetime

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


NESTED = {
    "robot": {"pose": {"x": 0.5}, "joints": [1, {"name": "wrist"}]},
    "robot.id": "r2",
    "row": {"items": ["ä", None, True]},
    "when": datetime.date(2026, 1, 31),
    "hole": {"value": None},
    "number": {7: "seven"},
    "question": "q",
}
FILLED = {
    "{robot.pose.x}": "0.5",
    "{robot[pose][x]:.2f}|{when:%Y}|{when.year}": "0.50|2026|2026",
    "{robot.joints.0} {robot.joints[1].name}": "1 wrist",
    "{robot.id}{number.7}": "r2seven",
    "{row}": '{"items": ["ä", null, true]}',
    "{row.items}{row.items.0}": '["ä", null, true]ä',
    "{row.items!s:>22}": '     ["ä", null, true]',
    "{{robot.pose.x}}": "{robot.pose.x}",
}
UNFILLED = {
    "{robot.pose.z}": "there is no 'z'. Available: x",
    "{robt.pose}": "there is no 'robt'. Did you mean 'robot'",
    "{robot.joints.2}": "there is no '2'. Available: 0, 1",
    "{row.keys}": "there is no 'keys'. Available: items",
    "{question.upper}": "there is no 'upper'",
    "{question.__class__}": "there is no '__class__'",
    "{when.replace}": "there is no 'replace'",
    "{hole.value}": "column 'hole.value' is None",
}


@pytest.mark.parametrize("template", FILLED)
def test_a_template_reads_parts_of_nested_columns_and_writes_lists_and_objects_as_json(template):
    (row,) = with_prompts(read([NESTED]), "here", DataArguments(prompt_template=template))
    assert row["prompt"] == FILLED[template] and row["robot"] == NESTED["robot"]


@pytest.mark.parametrize("template", UNFILLED)
def test_a_part_that_there_is_not_is_refused_with_those_that_there_are(template):
    with refused(f"the prompt of row 0 cannot be made .*{UNFILLED[template]}"):
        with_prompts(read([NESTED]), "here", DataArguments(prompt_template=template))


def test_a_question_is_known_again_by_the_part_that_a_template_names():
    rows = [[{"robot": {"name": name, "run": run}} for name in "ab"] for run in (1, 2)]
    first, second = (
        with_prompts(read(part), "here", DataArguments(prompt_template=template))
        for part, template in zip(rows, ("{robot.name}?", "Who is {robot.name}?"), strict=True)
    )
    assert (first.hashes != second.hashes).all()
    assert (first.keys[-1] == second.keys[-1]).all()


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
