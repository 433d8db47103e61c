"""The form in which a model is asked: system prompt, text as chat, variables of the template; refusals."""

from __future__ import annotations

import re

import pytest
from command_line import completes
from refusals import refused
from tiny_models import TEMPLATE, letters_trained, make_policy, make_task

from tokenrl import evaluate
from tokenrl.files import write_json
from tokenrl.language.policy.arguments import PromptArguments, saved_form
from tokenrl.runs.output import harmless

USER = [{"role": "user", "content": "the cat"}]
SYSTEM = [{"role": "system", "content": "count to ten"}]
TALK = [*USER, {"role": "assistant", "content": "sat on"}]
FASTER = TEMPLATE + "{% if quick is defined and quick %}{{ 'sat ' }}{% endif %}"
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + TEMPLATE
)
DEAF = TEMPLATE.replace("in messages", "in messages if m['role'] != 'system'")


def chat_policy(template=TEMPLATE, **form):
    policy = make_policy(kind="chat")
    policy.tokenizer.chat_template = template
    policy.ask(PromptArguments(**form))
    return policy


@pytest.mark.parametrize(
    ("prompt", "form", "text"),
    [
        ("the cat", {}, "the cat"),
        ("the cat", {"chat": True}, "u the cat a "),
        (USER, {"system_prompt": "count to ten"}, "s count to ten u the cat a "),
        ("the cat", {"chat": True, "system_prompt": "count to ten"}, "s count to ten u the cat a "),
        (TALK, {}, "u the cat a sat on"),
        (TALK, {"system_prompt": "count to ten"}, "s count to ten u the cat a sat on"),
        (USER, {"chat_template_kwargs": {"quick": True}}, "u the cat a sat "),
        (USER, {"chat_template_kwargs": '{"quick": false}'}, "u the cat a "),
        ("the cat", {"chat": False, "system_prompt": "", "chat_template_kwargs": {}}, "the cat"),
    ],
)
def test_what_the_model_reads(prompt, form, text):
    policy = chat_policy(FASTER, **form)
    assert policy.tokenizer.decode(policy.encode(prompt), skip_special_tokens=True) == text
    assert policy.encode(prompt).count(policy.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "form", "prompt", "said"),
    [
        (
            TEMPLATE,
            {"system_prompt": "count"},
            "the cat",
            "system_prompt is for chat .*'the cat'.*--chat",
        ),
        (
            FASTER,
            {"chat_template_kwargs": {"quick": 1}},
            "a",
            "chat_template_kwargs is for chat messages",
        ),
        (
            TEMPLATE,
            {"system_prompt": "count"},
            [*SYSTEM, *USER],
            "already begins with a message of the sys",
        ),
        (None, {"chat": True}, "the cat", "has no chat template.*without chat"),
        (
            GEMMA,
            {"system_prompt": "count"},
            USER,
            "messages of these roles: system, user .*System role",
        ),
        (
            GEMMA,
            {},
            [*SYSTEM, *USER],
            "System role not supported.*Give prompts as the template takes them",
        ),
        (
            DEAF,
            {"system_prompt": "count"},
            USER,
            "leaves out messages of the system.*prompt_template",
        ),
        (
            TEMPLATE,
            {"chat_template_kwargs": {"quick": True}},
            USER,
            "sets 'quick', which the chat template",
        ),
        (
            TEMPLATE,
            {"chat_template_kwargs": {"messages": []}},
            USER,
            "sets 'messages', .* prompt sets itself",
        ),
    ],
)
def test_a_form_in_which_the_model_cannot_be_asked_is_refused(template, form, prompt, said):
    with refused(said):
        chat_policy(template, **form).encode(prompt)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "model" / "adapter").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    write_json(tmp_path / "config.json", {"kind": "sft", "chat": True, "stop": ["Q:"]})
    return tmp_path


def test_a_run_and_its_models_are_asked_as_in_the_run_and_nothing_else_is(run, monkeypatch):
    (run / "other").mkdir()
    monkeypatch.chdir(run)
    for part in (".", "model", "model/adapter", "checkpoints/step_1"):
        assert saved_form(run / part) == saved_form(part) == {"chat": True, "stop": ("Q:",)}
    assert not any(map(saved_form, ("other", "owner/name", None, run.parent)))


# ---- special tokens in a prompt, and what a model writes ----


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (("a <eos> b", "<eos>"), 'contains "<eos>"'),
        (
            ("the Ω", "cat Ω"),
            r"The tokenizer loses \d+ of \d+ characters of prompts \([\d.]+%\): 'Ω'",
        ),
        (("the cat", "a"), "(contains|loses) "),
    ],
)
def test_sample_evaluate_and_train_warn_of_what_the_tokenizer_changes_once(
    prompts, words, saved, tmp_path, capsys
):
    def told():
        return len(re.findall(words, " ".join("".join(capsys.readouterr()).split())))

    model, task = str(saved(kind="chat")), make_task(prompts)
    completes("sample --model", model, "--prompt", *prompts, "--num-generations", "0")
    counts = [told()]
    evaluate(model=model, task=task, num_generations=0)
    counts.append(told())
    letters_trained(tmp_path / "run", task, model=model, quiet=False, max_steps=1)
    assert [*counts, told()] == [words[0] != "("] * 3


def test_what_a_model_writes_cannot_change_the_terminal(saved, capsys):
    text = "a\tb\nc\x1b[31m\x07\r\x00\x9b\u202e\u2066 é 日本　👩‍💻"
    shown = r"c\x1b[31m\x07\r\x00\x9b\u202e\u2066 é 日本　👩‍💻"
    assert harmless(text) == f"a\tb\n{shown}"
    completes("sample --model", str(saved()), "--prompt", "\x1b]0;title\x07")
    out = capsys.readouterr().out
    assert r"\x1b]0;title\x07" in out and "\x1b" not in out and "\x07" not in out
