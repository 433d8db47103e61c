"""The column `tools` of the data reaches the chat template, row by row, and null content is empty text."""

import json

import pytest
from refusals import refused
from tiny_environments import Guess, Recorded, Safe, chat_policy
from transformers import AutoModelForSequenceClassification

import tokenrl
from tokenrl.language.preferences.evaluation import encode_pairs
from tokenrl.language.preferences.pairs import read_pairs
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rollout.episodes import play
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.supervised.fit import encode_demonstrations
from tokenrl.language.tasks.task import load_task

NAMES = (
    "{% for tool in tools or [] %}{{ (tool.function or tool).name }},{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CAT, DOG = ({"type": "function", "function": {"name": name}} for name in ("cat", "dog"))
USER = {"role": "user", "content": "?"}


def speak(word: str) -> str:
    """Speak.

    Args:
        word: what to say.
    """
    return word


FORMS = [
    ([CAT, DOG], "cat,dog,"),
    ((CAT,), "cat,"),
    (json.dumps([CAT, DOG]), "cat,dog,"),
    ([json.dumps(CAT), DOG], "cat,dog,"),
    ([{"name": "cat", "description": "", "parameters": {}}], "cat,"),
    ([speak], "speak,"),
    *((value, "") for value in (None, "[]")),
]


def policy_of_names():
    policy = chat_policy()
    policy.tokenizer.chat_template = NAMES
    return policy


def shown(policy, ids):
    return policy.tokenizer.decode(ids).partition("u:")[0]


@pytest.mark.parametrize(("tools", "names"), FORMS)
def test_the_template_gets_the_tools_of_each_row_however_they_are_stored(tools, names):
    policy = policy_of_names()
    row = {"prompt": [USER], "tools": tools, "completion": "x", "chosen": "x", "rejected": "y"}
    policy.model.config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(policy.model.config)
    judge = RewardModel((classifier, policy.tokenizer))
    sampled, without = encode(policy, [row, {"prompt": [USER]}], Sampling(4))
    ((demonstrated, _),) = encode_demonstrations(policy, [row])
    ((chosen, _),) = encode_pairs(judge, read_pairs([row], "here"))
    read = [shown(policy, ids) for ids in (sampled, demonstrated, chosen, without)]
    assert read == [names, names, names, ""]
    assert judge([[USER]], ["x"], tools=[tools]) == judge.score([chosen])


@pytest.mark.parametrize("tools", ["hammer", 3, [3]])
def test_what_is_no_list_of_tools_is_refused_with_its_row_and_text_ignores_it(tools):
    rows = [{"prompt": [{**USER, "content": f"{i}"}], "tools": None, "x": i} for i in range(9)]
    rows[7]["tools"] = tools
    options = {"model": policy_of_names(), "reward": [lambda x, **_: x], "max_steps": 1}
    with refused(r"of row 7: The column tools holds .*JSON schemas"):
        tokenrl.train(task=rows, **options, quiet=True, max_completion_length=4)
    policy = chat_policy()
    text = {"prompt": "?", "tools": tools}
    assert encode(policy, [text], Sampling(4)) == [policy.encode("?")]


@pytest.mark.parametrize(("factory", "names"), [(Safe, "turn,"), (Guess, "cat,dog,")])
def test_beside_an_environment_its_own_tools_are_described_or_else_those_of_the_row(factory, names):
    policy = policy_of_names()
    policy.tokenizer.response_template = chat_policy().tokenizer.response_template
    row = {"prompt": [USER], "tools": [CAT, DOG]}
    recorded = Recorded(policy)
    environments = Environments(factory, max_turns=2)
    play(policy, recorded, environments, [(0, row)], Sampling(6, step=1), "training")
    assert shown(policy, recorded.histories[0][0]) == names


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
NULLS = [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "assistant", "reasoning_content": "hm"},
    {"role": "tool", "content": None},
]


@pytest.mark.parametrize("message", NULLS)
def test_content_that_is_null_is_empty_text(message):
    rows = [{"prompt": [{**USER, "content": f"{i}"}, message, USER]} for i in range(9)]
    task = load_task(rows, reward=[lambda completions, **_: [0.0] * len(completions)])
    for row in (*task.train_prompts, *task.eval_prompts):
        assert row["prompt"][1]["content"] == ""
