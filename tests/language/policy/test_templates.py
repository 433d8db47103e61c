"""What chat templates write: the time, their errors, arguments of calls, thoughts, the ends of turns, one BOS."""

from __future__ import annotations

import json
import re
from datetime import datetime

import pytest
from refusals import refused
from tiny_environments import chat_policy
from tiny_models import make_policy
from transformers import LlamaConfig, LlamaForSequenceClassification

from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.supervised.fit import encode_demonstrations

USER = [{"role": "user", "content": "hi"}]


def policy_with(template, **form):
    """A policy of characters with a chat template of its own."""
    policy = chat_policy()
    policy.tokenizer.chat_template = template
    policy.ask(PromptArguments(**form))
    return policy


def judge_of(tokenizer, **form):
    """A reward model with this tokenizer."""
    size = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 128)
    config = LlamaConfig(num_labels=1, num_hidden_layers=1, num_attention_heads=1, **size)
    judge = RewardModel((LlamaForSequenceClassification(config), tokenizer))
    judge.ask(PromptArguments(**form))
    return judge


def judge_with(template, **form):
    return judge_of(policy_with(template).tokenizer, **form)


def read(policy, ids):
    return policy.tokenizer.decode(ids)


# ---- the clock ----

TIME = "2031-02-03T04:05"


def test_a_template_reads_the_time_of_the_run_in_any_format():
    template = (
        "{{ strftime_now('%e %B %Y') }}|{{ strftime_now('100%%') }}|{{ messages[-1].content }}"
    )
    policy = policy_with(template, chat_time=TIME)
    expected = " 3 February 2031|100%|hi"
    assert policy.write(USER) == expected == read(policy, policy.encode(USER))
    judge = judge_with(template, chat_time=TIME)
    assert read(policy, judge.encode(USER, "hi")) == expected
    # the clock of plain transformers goes on
    now = policy.tokenizer.apply_chat_template(USER, tokenize=False)
    assert str(datetime.now().year) in now


# ---- errors of templates ----

BROKEN = {
    "ZeroDivisionError": "{{ 1 / (messages | length * 0) }}",
    "half of a pair": "{{ messages[0].role + '\\ud800' }}",
    "TemplateSyntaxError": "{% if messages %}",
    "TemplateError": "{{ raise_exception('no, never') }}",
    "no text": b"{{ messages }}",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_any_error_of_a_template_is_a_paragraph_that_names_the_row(kind):
    policy = policy_with(BROKEN[kind])
    calls = {
        "": lambda: policy.encode(USER),
        "The prompt of line 8: ": lambda: policy.encode_all(
            [USER], max_completion_length=4, locations=["line 8"]
        ),
        "The demonstration of row 0: ": lambda: encode_demonstrations(
            policy, [{"prompt": USER, "completion": "a"}]
        ),
        ".*": lambda: judge_with(BROKEN[kind]).encode(USER, "a"),
    }
    for row, call in calls.items():
        with refused(f"^{row}The chat template of .* refuses messages") as caught:
            call()
        assert "Traceback" not in str(caught.value)


# ---- arguments of calls ----

CALLED = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ CALL }}</tool_call>{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
WRITTEN = {
    "{{ c.function | tojson }}": (
        '{"name": "f", "arguments": {"a": "x\\"y", "b": 1}}',
        '{"name": "f", "arguments": {}}',
    ),
    "{{ c.function.arguments | tojson }}": ('{"a": "x\\"y", "b": 1}', "{}"),
    "{{ c.function.arguments }}": ('{"a": "x\\"y", "b": 1}', "{}"),  # as it is given
    "{{ 'f ' + c.function.arguments }}": ('f {"a": "x\\"y", "b": 1}', "f {}"),  # fails on an object
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }} {% endfor %}": (
        'a=x"y b=1 ',
        "",
    ),
}
"""By what a template writes of a call: that of some arguments, and of none."""
TEXT = '{"a": "x\\"y", "b": 1}'


def called(arguments):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": function}]}


@pytest.mark.parametrize("call", WRITTEN)
def test_arguments_that_are_json_text_are_encoded_once_and_empty_text_is_an_empty_object(call):
    template = CALLED.replace("{{ CALL }}", call)
    policy = policy_with(template)
    some, none = WRITTEN[call]
    for text, written in ((TEXT, some), ("", none), ("{}", none)):
        turn = f"<tool_call>{written}</tool_call><eos>"
        message = called(text)
        prompt = [*USER, message, {"role": "tool", "content": "7"}]
        assert read(policy, policy.encode(prompt)) == f"u:hi<eos>a:{turn}t:7<eos>a:"
        pairs = encode_demonstrations(policy, [{"prompt": USER, "completion": [message]}])
        assert [read(policy, ids) for _, ids in pairs] == [turn]
        assert read(policy, judge_with(template).encode(USER, [message])) == f"u:hi<eos>a:{turn}"
        assert message == called(text)  # which is the user's


@pytest.mark.parametrize("arguments", ["null", "7", '["a"]', "{", "a", None, ["a"], 7])
@pytest.mark.parametrize("call", WRITTEN)
def test_arguments_that_are_no_object_are_refused_with_their_row(call, arguments):
    policy = policy_with(CALLED.replace("{{ CALL }}", call))
    rows = [{"prompt": USER, "completion": [called(x)]} for x in ("{}", arguments)]
    with refused(
        re.escape(f"row 1: A call of a tool has the arguments {arguments!r}: they must be an obj")
    ):
        encode_demonstrations(policy, rows)


# ---- demonstrations of several messages ----


def test_each_turn_of_a_demonstration_is_learnt_behind_all_before_it():
    policy = policy_with(CALLED.replace("{{ CALL }}", "{{ c.function | tojson }}"))
    result = {"role": "tool", "content": "7"}
    done = {"role": "assistant", "content": "so 7"}
    row = {"prompt": USER, "completion": [called(TEXT), result, done]}
    pairs = [(read(policy, x), read(policy, y)) for x, y in encode_demonstrations(policy, [row])]
    turn = f'<tool_call>{{"name": "f", "arguments": {TEXT}}}</tool_call><eos>'
    assert pairs == [("u:hi<eos>a:", turn), (f"u:hi<eos>a:{turn}t:7<eos>a:", "so 7<eos>")]


@pytest.mark.parametrize(
    ("prompt", "roles", "words"),
    [
        ("hi", ["assistant", "user", "assistant"], "messages of assistant user assistant"),
        ("hi", ["user"], "messages of user"),
        (USER, ["assistant", "assistant"], "messages of assistant assistant"),
        (USER, ["assistant", "user"], "messages of assistant user"),
        (USER, [], "the completion is an empty list"),
    ],
)
def test_messages_that_are_no_demonstration_are_refused(prompt, roles, words):
    completion = [{"role": role, "content": "a"} for role in roles]
    with refused(rf"^The demonstration of row 0: .*{words}.*It needs a prompt"):
        encode_demonstrations(policy_with(CALLED), [{"prompt": prompt, "completion": completion}])


# ---- thoughts ----

KEEPS = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<eos>{% endfor %}"
PARSES = (
    "{% for m in messages %}<{{ m.role[0] }}>{% if '</think>' in m.content %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>\n"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% elif m.role == 'assistant' %}<think>\n</think>\n"
    "{{ m.content }}{% else %}{{ m.content }}{% endif %}<eos>{% endfor %}"
)
OPEN, SHUT = "<think>\n", "<think>\n\n</think>\n\n"
TALKS = [
    (template, OPEN, text, learnt)
    for template in (KEEPS, PARSES)
    for text, learnt in [
        ("<think>\nhm\n</think>\n7", "hm\n</think>\n7"),
        ("\n<think>\nhm\n</think>\n7", "hm\n</think>\n7"),
        ("hm\n</think>\n7", "hm\n</think>\n7"),
    ]
]
TALKS += [
    (KEEPS, SHUT, f"{SHUT}7", "7"),
    (KEEPS, SHUT, "7", "7"),
    (KEEPS, "<think>", "<think>\nhm</think>7", "\nhm</think>7"),
    (KEEPS, "", "<think>hm</think>7", "<think>hm</think>7"),  # the template leaves it to the model
    (KEEPS, "", "<a>b", "<a>b"),  # which the template writes, too
    (PARSES, "", "7", "7"),
    (KEEPS, "the ", "the cat", "the cat"),  # words may come twice
]


@pytest.mark.parametrize(("template", "begun", "text", "learnt"), TALKS)
def test_thoughts_begin_once(template, begun, text, learnt):
    end = "{% if add_generation_prompt %}{{ '<a>' + " + json.dumps(begun) + " }}{% endif %}"
    policy = policy_with(template + end)
    for completion in (text, [{"role": "assistant", "content": text}]):
        ((prompt, ids),) = encode_demonstrations(
            policy, [{"prompt": USER, "completion": completion}]
        )
        assert read(policy, prompt) == f"<u>hi<eos><a>{begun}"
        assert read(policy, ids) == f"{learnt}<eos>"


def test_thoughts_beside_the_content_are_learnt_as_the_template_writes_them():
    thoughts = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    end = "{% if add_generation_prompt %}<a><think>{% endif %}"
    policy = policy_with(KEEPS.replace("{{ m.content }}", thoughts + "{{ m.content }}") + end)
    message = {"role": "assistant", "content": "7", "reasoning_content": "hm"}
    ((_, ids),) = encode_demonstrations(policy, [{"prompt": USER, "completion": [message]}])
    assert read(policy, ids) == "hm</think>7<eos>"


# ---- the ends of turns ----

CHATML = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}</call>{% endfor %}END{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}{% if tools %}{% endif %}"
)


def count(number: int) -> str:
    """Count.

    Args:
        number: up to this.
    """


@pytest.mark.parametrize("tools", [(), (count,)])
@pytest.mark.parametrize(
    ("end", "stop", "turn", "missing"),
    [
        ("<im_end>\n", None, "ab<eos>", "<im_end>\n"),  # an end that is no EOS
        ("<eos>\n", None, "ab<eos>", "\n"),
        ("<eos>\n", None, "ab", "<eos>\n"),
        ("<im_end>\n", ("<im_end>",), "ab<im_end>", "\n"),  # ended at a stop string
        ("\n\n", None, "ab<eos>", "\n\n"),  # white space alone
        ("\n", ("\n",), "ab\n", ""),
        ("", None, "ab<eos>", ""),
    ],
)
def test_between_two_turns_stands_what_the_template_writes(end, stop, turn, missing, tools):
    policy = policy_with(CHATML.replace("END", end.replace("\n", "{{ '\n' }}")), stop=stop)
    before = policy.encode(USER) + policy.tokenizer.encode(turn, add_special_tokens=False)
    reply = {"role": "tool", "name": "count", "content": "7"} if tools else USER[0]
    ended = before[-1] in policy.ends
    ids = policy.reply_ids([reply], ended=ended, chat=True, tools=tools, before=before)
    assert read(policy, ids) == f"{missing}<{reply['role']}>\n{reply['content']}{end}<assistant>\n"


def test_an_end_of_a_turn_that_is_a_special_token_stands_in_no_demonstration():
    """As base models of Qwen3 have it: the template ends turns otherwise than the tokenizer."""
    policy = policy_with(CHATML.replace("END", "<im_end>{{ '\n' }}"))
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<im_end>"]})
    rows = [{"prompt": USER, "completion": [called("{}")]}]
    ((_, ids),) = encode_demonstrations(policy, rows)
    assert read(policy, ids) == "<call>f</call><eos>"


# ---- one BOS ----


@pytest.mark.parametrize("text", ["<bos>the cat", "the cat", "<bos>", "the <bos>cat"])
def test_a_text_has_one_bos_in_front(text):
    policy = make_policy(kind="chat")  # whose tokenizer adds one
    judge, bare = judge_of(policy.tokenizer), text.removeprefix("<bos>")
    ids = [0, *policy.tokenizer(bare, add_special_tokens=False).input_ids]
    ((prompt, _),) = encode_demonstrations(policy, [{"prompt": text, "completion": "a"}])
    assert policy.encode(text) == prompt == judge.encode(text, "") == judge.encode(bare, "") == ids
    assert policy.encode_all([text], max_completion_length=4) == [ids]
    plain = make_policy(kind="pad")  # which adds none
    assert plain.encode(f"{text} ")[:2] != [0, 0]
