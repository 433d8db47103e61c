"""What a policy reads after its turn: replies of environments as token ids; tools, and calls of them."""

from __future__ import annotations

import pytest
from refusals import refused
from tiny_environments import CALLS
from tiny_models import TEMPLATE, make_policy

from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.rewards.tools import assistant_message

# As Qwen3 writes messages: tools first, the thoughts of the last turn only, results of tools as the user's.
TURNS = (
    "{% if tools %}tools{% for tool in tools %} {{ tool.function.name }}{% endfor %}<eos> {% endif %}"
    "{% for m in messages %}{{ 'u ' if m.role == 'tool' else m.role[0] + ' ' }}"
    "{% if m.role == 'assistant' and loop.last %}on the {% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }}</tool_call>{% endfor %}"
    "<eos> {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
SAME = TURNS.replace("on the ", "")
USER = [{"role": "user", "content": "the cat"}]
RESULT = [{"role": "tool", "name": "count", "content": "ten"}]


def count(number: int) -> str:
    """Count.

    Args:
        number: up to this.
    """


def policy_with(template):
    policy = make_policy(kind="chat")
    policy.tokenizer.chat_template = template
    return policy


def test_a_reply_to_a_policy_of_text_is_the_text_alone():
    policy = make_policy(kind="chat")  # whose tokenizer begins each text with BOS
    ids = policy.reply_ids([*USER, *RESULT], ended=True, chat=False)
    assert policy.tokenizer.decode(ids) == "the catten"
    policy.tokenizer.chat_template = TURNS
    policy.ask(PromptArguments(chat=True))
    assert (
        policy.tokenizer.decode(policy.reply_ids(USER, ended=True, chat=False))
        == " u the cat<eos> a "
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'two' if messages|length == 2 else 'ten' }}" + TURNS,  # a heading that changes
        TURNS.replace("in messages", "in messages[-1:]"),  # earlier turns are dropped
        SAME
        + "{% if not add_generation_prompt %}<eos>{% endif %}",  # as Phi ends a conversation twice
        SAME.replace("{{ 'u '", "<eos>{{ 'u '").replace(
            "<eos> {% endfor", " {% endfor"
        ),  # EOS in front
        TEMPLATE
        + "{% if not add_generation_prompt %}cat{% endif %}",  # no EOS, and an end of its own
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(template):
    with refused(r"tiny llama.* writes earlier messages otherwise"):
        policy_with(template).reply_ids(USER, ended=True, chat=True)


def test_tools_are_shown_by_the_template_or_refused():
    policy = policy_with(TURNS)
    assert (
        policy.tokenizer.decode(policy.encode(USER, [count]))
        == "tools count<eos> u the cat<eos> a "
    )
    with refused(r"tools, but a prompt is text: 'the cat'.*--chat"):
        policy.encode("the cat", [count])
    with refused("never reads tools"):
        policy_with(TEMPLATE).encode(USER, [count])


QWEN = CALLS | {"start_anchor": "a "}


CALL = '<tool_call>{"name": "count", "arguments": {"number": 3}}</tool_call>'
MALFORMED = [
    CALL.replace("}}", "}"),
    CALL.replace('{"number": 3}', "[]"),
    CALL.replace('"count"', "3"),
]


@pytest.mark.parametrize("template", [None, QWEN])
def test_calls_are_read_and_malformed_ones_are_named(template, monkeypatch):
    tokenizer = policy_with(TURNS).tokenizer
    monkeypatch.setattr(tokenizer, "response_template", template, raising=False)
    # the tiny one lacks braces
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "".join(map(chr, ids)))

    def read(text, tools=(count,)):
        ids = [ord(character) for character in text]
        return assistant_message(tokenizer, ids, list(map(ord, "u cat a ")), text, tools)

    message = read("sat" + CALL + CALL)
    assert (message["role"], message["content"]) == ("assistant", "sat")
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [{"name": "count", "arguments": {"number": 3}}] * 2
    assert read("sat") == {"role": "assistant", "content": "sat"}
    assert read(CALL, ()) == {"role": "assistant", "content": CALL}
    for text in MALFORMED:
        message = read(text)
        assert message["malformed"] and message["content"] == text
        assert "tool_calls" not in message
