"""`--check`: every problem is provoked, several are told at once, and the caller's model stays as it is."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import (
    LETTERS,
    Engine,
    letter_task,
    letters,
    letters_trained,
    make_model,
    make_policy,
    make_task,
    make_tokenizer,
    weights,
)


def starts_with_a(completions, **_):
    return [float(text.startswith("a")) for text in completions]


def nothing(completions, **_):
    return [0.0] * len(completions)


def abstain(completions, **_):
    return [None] * len(completions)


def broken(completions, **_):
    raise ValueError("no such file")


@pytest.fixture
def check(tmp_path):
    """Check a run; without options one of a tiny model of letters, in which nothing is wrong."""

    def start(reward=starts_with_a, prompts=LETTERS, *, fields=(), **options):
        shape = {"max_steps": 12, "prompts_per_step": 16, "num_generations": 8, "check": True}
        task = options.pop("task", None) or letter_task(reward, prompts, **dict(fields))
        options = shape | {"learning_rate": None, "eval_every": None} | options
        return letters_trained(tmp_path / "new" / "run", task, **options)

    return start


@pytest.fixture
def check_policy(check):
    """Check a run on the four prompts of the tiny models' task."""

    def start(policy, task=None, **options):
        small = {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 8}
        return check(task=task or make_task(), model=policy, **(small | options))

    return start


def test_a_check_makes_the_first_step_of_the_run_on_a_copy_and_says_what_the_run_takes(
    check, tmp_path, said
):
    model, tokenizer = letters()
    before, calls = weights(model), []

    def counted(completions, **_):
        calls.append(list(completions))
        return starts_with_a(completions)

    result = check(counted, model=(model, tokenizer), estimator="ppo", quiet=False)
    assert (result.exit_code, result.exit_reason, result.flags, result.steps) == (0, "check", (), 0)
    assert torch.equal(weights(model), before) and all(p.grad is None for p in model.parameters())
    output = said()
    (checked,) = calls
    differs = torch.tensor(starts_with_a(checked)).view(16, 8).std(1).count_nonzero() / 16
    for pattern in (
        r"The first prompt, as the model reads it: \w+>",
        r"prompt completion reward ─+ (\S+ \S+ [01] ){4}Check passed: model, data",
        rf"reward 0\.\d+ on average; differs within {differs:.0%} of 16 groups of 8 completions \(128 in all\)",
        r"completions \d\.\d tokens on average; \d+% cut at 4",
        r"time 12 steps of \S+ s, 13 evaluations of \S+ s: about 0:\d\d in all, at the pace of this step",
        r"memory [\d.]+ [MG]B",
    ):
        assert re.search(pattern, output), pattern
    assert list(tmp_path.iterdir()) == []
    check(counted, model=(model, tokenizer), estimator="ppo", check=False, max_steps=1)
    assert checked in calls[1:] and not torch.equal(weights(model), before)


def test_all_problems_are_told_at_once(check, capsys, tmp_path):
    prompts = [f"Z{x}" for x in LETTERS]
    result = check(nothing, prompts, learning_rate=0.1)
    assert (result.exit_code, result.exit_reason) == (2, "check")
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "tokenrl: Check not passed: 3 problems. Nothing was trained."
    told = {
        "unknown-characters": "The tokenizer loses 18 of 72 characters of prompts, answers and",
        "no-signal": "In none of 16 groups of 8 completions (128 in all) do the rewards differ; their mean is 0.",
        "unusual-rate": "The learning rate 0.1 is 1e+03 times the 0.0001 that is usual.",
    }
    assert result.flags == tuple(told)
    for number, (line, (flag, text)) in enumerate(zip(lines, told.items(), strict=True), 1):
        assert line.startswith(f"  {number}. {flag}: {text}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("reward", "prompts", "words"),
    [
        (broken, LETTERS, "broken raised ValueError: no such file"),
        (abstain, LETTERS, "abstained from every completion of this step"),
        (starts_with_a, [*LETTERS, 14 * "a"], "The prompt of row 16 has 14 tokens"),
        (starts_with_a, [*LETTERS, [{"role": "user", "content": "a"}]], "has no chat template"),
    ],
)
def test_a_step_that_fails_does_not_hide_the_rest(check, reward, prompts, words, capsys):
    result = check(reward, prompts, learning_rate=0.5)
    assert (result.exit_code, result.flags) == (2, ("step-failed", "unusual-rate"))
    assert words in capsys.readouterr().err


def test_the_prompt_is_shown_as_the_model_reads_it_with_completions_and_each_reward(
    check_policy, said
):
    task = make_task(reward=[starts_with_a, nothing])
    check_policy((make_model(), make_tokenizer("chat")), task, chat=True, quiet=False)
    output = said()
    assert re.search(r"reads it: <bos> ?u [^|]+ a ", output), output
    assert re.search(
        r"completion starts_with_a nothing reward .*( ([01]) 0 \2 .*){4}Check passed", output
    )


def test_what_may_be_meant_so_is_no_problem(check):
    """A long held-out prompt that may be cut, and equal rewards of few completions."""
    fields = {"eval_prompts": [{"prompt": "ab>"}, {"prompt": 14 * "a"}]}
    assert check(fields=fields).flags == ("step-failed",)
    assert check(fields=fields, truncate_prompts=True).flags == ()
    result = check(nothing, prompts_per_step=2)
    assert (result.exit_code, result.flags) == (0, ("no-signal",))
    assert check(nothing, prompts_per_step=4).exit_code == 2


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"completion": "ab\u00e9d" + 13 * "abcd"}, 0),  # one of 60 characters: a remark
        ({"answer": {"é": 1}}, 2),
        ({"answer": [["é"]]}, 2),
    ],
)
def test_characters_that_the_tokenizer_loses_are_counted(check, row, code, capsys):
    rows = [{"prompt": f"{x}>", **row} for x in "abcd"]
    result = check(fields={"train_prompts": rows, "demonstrations": rows[:1]}, quiet=False)
    assert result.exit_code == code and "unknown-characters" in result.flags
    output = " ".join("".join(capsys.readouterr()).split())
    assert len(re.findall(r"loses \d+ of .*?'é'", output)) == 1


@pytest.mark.parametrize("stop", [None, "<think>"])
def test_special_tokens_that_no_reward_sees_are_said_by_the_check_and_once_in_a_run(
    check_policy, said, stop
):
    """Unless they end completions."""
    policy = make_policy(kind="chat")
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    words = r"Completions hold special tokens \(<think>\), which the text of a completion leaves out: rewards"
    for options in ({}, {"check": False, "max_steps": 3}):
        result = check_policy(policy, stop=stop, quiet=False, **options)
        assert len(re.findall(words, said())) == (stop is None) and result.exit_code == 0


@pytest.mark.parametrize(("kind", "code"), [("chat", 2), ("pad", 0)])
def test_completions_that_never_end_are_a_problem_of_a_chat_model_asked_in_plain_text(
    check_policy, capsys, kind, code
):
    """The model's weights forbid an end; only its tokenizer says how to ask it."""
    model = make_model(eos_token_id=95), make_tokenizer(kind)
    options = {"max_steps": 2, "temperature": 0.2}
    result = check_policy(model, max_completion_length=2, **options)
    assert (result.exit_code, result.flags) == (code, ("truncation",))
    output = capsys.readouterr().err
    is_told = "Every completion was cut at 2 tokens" in output and "--chat" in output
    assert is_told == (kind == "chat")
    task = make_task()
    task.max_completion_length = 2  # only a limit that the user gave is worth a remark
    flags = check_policy(model, task, max_completion_length=None, **options).flags
    assert ("truncation" in flags) == (kind == "chat")


def test_a_sampler_with_other_weights_and_a_policy_without_entropy_are_found(check_policy, capsys):
    def engine(policy, *_):
        made = Engine(policy)
        with torch.no_grad():
            for p in made.policy.model.parameters():
                p.mul_(1.1)
        made.sync = lambda policy: None
        return made

    assert check_policy(make_policy(), generator=engine).flags == ("sampling-differs",)
    assert re.search(r"differ by 0\.\d+ nats per token", capsys.readouterr().err)
    assert "entropy-collapsed" in check_policy(make_policy(), temperature=1e-3).flags
