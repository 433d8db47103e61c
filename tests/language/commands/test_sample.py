"""`tokenrl sample` with a task answers any prompt, and rewards those that the task's reward can judge."""

from __future__ import annotations

import pytest

from tokenrl.language.commands.arguments import SampleArguments
from tokenrl.language.commands.sample import Sampler
from tokenrl.language.policy.model import wrap
from tokenrl.language.policy.saving import save_policy
from toy_tasks import load


@pytest.mark.parametrize("name", ["target_length", "addition"])
def test_only_prompts_of_the_task_are_rewarded(name, tmp_path, capsys):
    """The reward of a task needs a column, or fails on a prompt that it cannot read."""
    task = load(name)
    save_policy(wrap(*task.build(0)), tmp_path)
    args = SampleArguments(model=str(tmp_path), task=name, num_generations=3)
    row = task.train_prompts[1]
    sampler = Sampler(args)
    strange, defaults, other = (sampler(prompt) for prompt in ("1", row["prompt"], "2"))
    assert [completion.reward for completion in strange + other] == [None] * 6
    columns = {key: [value] * 3 for key, value in row.items() if key != "prompt"}
    texts, rewards, _ = zip(*defaults, strict=True)
    expected = task.reward([row["prompt"]] * 3, [*texts], **columns)
    assert [*rewards] == pytest.approx(expected)
    output = capsys.readouterr().err
    # once, not for each prompt
    assert output.count("no reward") == 1 and "none of the task's" in output
    assert Sampler(args)("1") == strange
