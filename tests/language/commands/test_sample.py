"""`tokenrl sample` with a task answers any prompt, and rewards those that the task's reward can judge."""

from __future__ import annotations

import pytest

from tokenrl.language.commands.arguments import SampleArguments
from tokenrl.language.commands.sample import Sampler
from tokenrl.language.policy.model import wrap
from tokenrl.language.policy.saving import save_policy
from toy_tasks import load


@pytest.fixture(scope="module", params=["target_length", "addition"])
def task(request, tmp_path_factory):
    """A task whose reward needs a column or fails on a prompt that it cannot read, and an untrained model."""
    directory = tmp_path_factory.mktemp(request.param)
    save_policy(wrap(*load(request.param).build(0)), directory)
    return request.param, str(directory)


def test_only_prompts_of_the_task_are_rewarded(task, capsys):
    name, model = task
    args = SampleArguments(model=model, task=name, num_generations=3)
    row = load(name).train_prompts[1]
    sampler = Sampler(args)
    strange, defaults, other = (sampler(prompt) for prompt in ("1", row["prompt"], "2"))
    assert [reward for _, reward in strange + other] == [None] * 6
    columns = {key: [value] * 3 for key, value in row.items() if key != "prompt"}
    texts = [text for text, _ in defaults]
    expected = load(name).reward([row["prompt"]] * 3, texts, **columns)
    assert [reward for _, reward in defaults] == pytest.approx(expected)
    output = capsys.readouterr().err
    # once, not for each prompt
    assert output.count("no reward") == 1 and "none of the task's" in output
    assert Sampler(args)("1") == strange
