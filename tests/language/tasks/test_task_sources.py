"""Prompts from columns and templates, and imports by name, without a file of data."""

import pytest
from refusals import refused

from tokenrl.errors import Refused
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


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        (float("nan"), r"nan \(float\)"),
        (True, r"True \(bool\)"),
        ([], "an empty list"),
        ({"role": "user", "content": "a"}, "dict"),
        (["a"], r"message 0 of the prompt is 'a' \(str\)"),
        (
            [{"role": "user", "content": "a"}, {"role": "user"}],
            "message 1 of the prompt has content None",
        ),
        ([{"content": "a"}], "message 0 of the prompt has role None"),
        ([{"role": "assistant", "content": None}], "message 0 of the prompt has content None"),
        ("a\ud800", r"the prompt holds '\\ud800', which UTF-8 cannot write"),
        ([{"role": "user", "content": "\udcff"}], r"message 0 of the prompt has content '\\udcff'"),
    ],
)
def test_bad_prompts_are_refused_with_their_row(prompt, fault):
    good = [{"prompt": "\U0001f600"}, {"prompt": [{"role": "user", "content": ""}]}]
    bad = [*good, {"prompt": prompt}]
    for rows in ((bad, good), (good, bad)):
        with refused(f"task 'mine', .*_prompts, row 2: .*{fault}"):
            find_task(TaskArguments(task=PromptTask("mine", *rows, lambda completions: [0.0])))


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
def test_an_environment_alone_is_a_task_of_empty_prompts(echo_file, flag):
    for attribute in ("Env", "make"):
        args = TaskArguments(**{flag: f"{echo_file}:{attribute}"}, max_turns=3, malformed="observe")
        task, rewards = find_task(args)
        assert args.task == task.name == f"{echo_file}:{attribute}"
        assert [*task.train_prompts, *task.eval_prompts] == [{"prompt": ""}] * (512 + 64)
        assert callable(task.environment) and rewards.environments.max_turns == 3
        assert rewards.environments.malformed == "observe" and rewards.environments.share_seed
    task, _ = find_task(TaskArguments(**{flag: f"{echo_file}:Env"}, eval_size=5))
    assert len(task.eval_prompts) == 5 and len(load_task(f"{echo_file}:Env").eval_prompts) == 64
    chat = load_task(f"{echo_file}:Env", chat=True)
    assert chat.train_prompts[0]["prompt"] == [{"role": "user", "content": ""}]


def test_an_environment_beside_data_takes_its_rows_and_needs_no_reward(echo_file):
    rows = [{"prompt": f"p{i}", "environment": "a"} for i in range(10)]
    for environment in (Echo, {"a": Echo}, f"{echo_file}:Env", f"{echo_file}:FACTORIES"):
        task, rewards = find_task(
            TaskArguments(task=rows, environment=environment, reward_timeout=2.0)
        )
        assert len(task.train_prompts) == 8 and task.train_prompts[0]["environment"] == "a"
        assert rewards.environments.timeout == 2.0 and len(rewards.names) == 1
    mine = PromptTask("mine", rows, rows, [], environment=Echo)
    assert find_task(TaskArguments(task=mine))[0].environment is Echo
    other, _ = find_task(TaskArguments(task=mine, environment=make_echo))
    assert other.environment is make_echo and mine.environment is Echo
    # which no row of an empty prompt names
    for environment in (
        {"a": Echo},
        f"{echo_file}:FACTORIES",
    ):
        with pytest.raises(Refused):
            find_task(TaskArguments(environment=environment))
