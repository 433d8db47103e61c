"""`--check`: every problem is provoked, several are told at once, and no weight moves."""

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

import tokenrl
from tokenrl.language.training import loop
from tokenrl.language.training.check import check_run


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
        shape = {
            "max_steps": 12,
            "prompts_per_step": 16,
            "num_generations": 8,
            "learning_rate": None,
        }
        task = options.pop("task", None) or letter_task(reward, prompts, **dict(fields))
        return letters_trained(tmp_path / "new" / "run", task, **shape | {"check": True} | options)

    return start


@pytest.fixture
def check_policy(check):
    """Check a run on the four prompts of the tiny models' task."""

    def start(policy, task=None, **options):
        small = {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 8}
        return check(task=task or make_task(), model=policy, **(small | options))

    return start


def problems(capsys) -> list[str]:
    """The numbered lines on the standard error, from which every other line must differ."""
    first, *lines = capsys.readouterr().err.splitlines()
    count = f"{len(lines)} problem{'s' * (len(lines) > 1)}"
    assert first == f"tokenrl: Check not passed: {count}. Nothing was trained."
    assert [line[:5] for line in lines] == [f"  {i}. " for i in range(1, len(lines) + 1)]
    return [line[5:] for line in lines]


def test_a_check_that_passes_shows_what_the_run_takes(check, tmp_path, capsys):
    result = check(quiet=False)
    assert (result.exit_code, result.exit_reason, result.flags, result.steps) == (0, "check", (), 0)
    assert "reward_greedy" in result.eval_before
    captured = capsys.readouterr()
    output = " ".join(captured.out.split())
    assert captured.err == "" and "Check passed: model, data" in output
    for pattern in (
        r"reward 0\.\d+ on average; differs within \d+% of 16 groups of 8 completions",
        r"completions \d\.\d tokens on average; \d+% cut at 4",
        r"scoring differs from sampling by \S+ nats per token on average, (\S+) at most",
        r"time 12 steps of \S+ s, 13 evaluations of \S+ s: about 0:\d\d in all",
        r"memory [\d.]+ [MG]B of the computer so far",
        r"disk [\d.]+ [MGT]B are free",
    ):
        assert re.search(pattern, output), pattern
    assert float(re.search(r"average, (\S+) at most", output)[1]) < 1e-4
    assert list(tmp_path.iterdir()) == []


def distinct(completions, **_):
    return [len(set(text)) / 4 for text in completions]


@pytest.mark.parametrize(("options", "falls"), [({}, False), ({"learning_rate": 30.0}, True)])
def test_a_check_says_whether_its_steps_lower_the_held_out_reward(check, options, falls, capsys):
    model, tokenizer = letters()
    before = weights(model)
    held_out = [{"prompt": prompt} for prompt in LETTERS[:8]]
    result = check(
        distinct,
        fields={"eval_prompts": held_out},
        model=(model, tokenizer),
        max_steps=60,
        eval_generations=4,
        quiet=False,
        **options,
    )
    assert torch.equal(weights(model), before) and ("reward-falls" in result.flags) == falls
    captured = capsys.readouterr()
    numbers = re.search(r"held out +reward (\S+), (\S+) after the trial steps", captured.out)
    assert (float(numbers[2]) < float(numbers[1]) - 0.1) == falls
    output = " ".join((captured.out + captured.err).split())
    assert ("try --learning-rate 0.0001, which is usual here" in output) == falls


@pytest.mark.parametrize("estimator", ["ppo", "reinforce_running_mean"])
def test_a_check_changes_no_weight(check, estimator, monkeypatch):
    model, tokenizer = letters()
    before, states = weights(model), []

    def watched(run, *rest):
        for work in (lambda: None, lambda: check_run(run, *rest)):
            result = work()
            critic = {} if run.learner.critic is None else run.learner.critic.head.state_dict()
            states.append(([x.tolist() for x in critic.values()], run.memory.state_dict()))
        return result

    monkeypatch.setattr(loop, "check_run", watched)
    result = check(model=(model, tokenizer), estimator=estimator)
    assert result.exit_code == 0 and torch.equal(weights(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert states[0] == states[1] and bool(states[0][0]) == (estimator == "ppo")


def test_all_problems_are_told_at_once(check, capsys, tmp_path):
    prompts = [*LETTERS[:13], *(10 * letter for letter in "abc")]
    fields = {"demonstrations": [{"prompt": "ab>", "completion": "abcdabcdab"}]}
    fields["eval_prompts"] = [{"prompt": prompt} for prompt in prompts[:4]]
    settings = {"max_completion_length": 8, "learning_rate": 0.1}
    result = check(nothing, prompts, fields=fields, **settings)
    assert (result.exit_code, result.exit_reason) == (2, "check")
    values = problems(capsys)
    assert [line.partition(":")[0] for line in values] == list(result.flags)
    output = {
        "prompts-refused": "3 of 16 training prompts cannot be asked. The first is that of row 13. The "
        "prompt of row 13 has 10 tokens, with its completion 18, more than the model's context of 16: give",
        "answers-too-long": "1 of the first 1 demonstrations have more than 8 tokens; the longest has 11.",
        "no-signal": "In none of 16 groups of 8 completions do the rewards differ; their mean is 0.",
        "unusual-rate": "The learning rate 0.1 is 1e+03 times the 0.0001 that is usual for this model.",
    }
    assert result.flags == tuple(output)
    assert all(words in line for line, words in zip(values, output.values(), strict=True))
    assert "--learning-rate 0.0001" in values[3]
    assert list(tmp_path.iterdir()) == []


def test_a_reward_that_fails_does_not_hide_the_rest(check, capsys):
    for reward, flag, words in (
        (broken, "step-failed", "broken raised ValueError: no such file"),
        (abstain, "step-failed", "abstained from every completion of this step"),
    ):
        result = check(reward, learning_rate=0.5, quiet=False)
        assert result.exit_code == 2 and result.flags == (flag, "unusual-rate")
        captured = capsys.readouterr()
        assert words in captured.err
        assert "are free" in captured.out


def test_small_steps_are_repeated_until_there_is_a_signal(check):
    calls = []

    def late(completions, **_):
        calls.append(len(completions))
        return [float(i == 0 and calls.count(2) == 5) for i in range(len(completions))]

    small = {"prompts_per_step": 1, "num_generations": 2, "eval_generations": 0}
    assert check(late, **small).exit_code == 0
    assert calls.count(2) == 7  # steps 1 to 5, and two evaluations of two prompts
    assert check(nothing, **small).flags == ("no-signal",)


@pytest.mark.parametrize(
    ("max_steps", "every", "steps", "held_out"), [(10, 0, 1, 16), (200, 20, 3, 30)]
)
def test_a_check_does_a_twentieth_of_the_run_or_the_least_that_can_be_judged(
    check, max_steps, every, steps, held_out, capsys
):
    """The long run has 11 evaluations of 55 prompts, of which a check makes a twentieth: 30."""
    calls = []

    def counted(completions, **_):
        calls.append(len(completions))
        return [float(text[:1] == "a") for text in completions]

    fields = {
        "eval_prompts": [{"prompt": f"{x}{prompt}"} for x in "abcd" for prompt in LETTERS][:55]
    }
    options = {"max_steps": max_steps, "fields": fields, "eval_generations": 2, "eval_every": every}
    assert check(counted, quiet=False, **options).exit_code == 0
    assert calls == [128] * steps + 2 * [held_out, 2 * held_out]
    output = " ".join(capsys.readouterr().out.split())
    for words in ("with these steps", "as before the first step"):
        assert f"evaluating {held_out} of 55 held-out prompts, {words}" in output
    assert f"checked {steps} of {max_steps} steps, {held_out} of 55 held-out prompts" in output


def test_the_prompt_is_shown_as_the_model_reads_it_with_completions_and_each_reward(
    check_policy, capsys
):
    task = make_task(reward=[starts_with_a, nothing])
    check_policy((make_model(), make_tokenizer("chat")), task, chat=True, quiet=False)
    output = " ".join(capsys.readouterr().out.split())
    assert re.search(r"prompt <bos> ?u [^|]+ a disk", output), output
    assert re.search(
        r"completion starts_with_a nothing reward .*( ([01]) 0 \2 .*){4}Check passed", output
    )


@pytest.mark.parametrize(
    ("prompts", "demonstration", "flags", "words"),
    [
        (LETTERS, "abcd", (), "unknown to the tokenizer 0 of 61 characters"),
        (LETTERS, "ab\u00e9d" + 13 * "abcd", (), "The tokenizer loses 1 of 113 characters"),
        (
            [f"Z{x}" for x in LETTERS],
            "ab",
            ("unknown-characters",),
            "18 of 77 characters of prompts",
        ),
    ],
)
def test_characters_that_the_tokenizer_loses_are_counted(
    check, prompts, demonstration, flags, words, capsys
):
    rows = [{"prompt": "ab>", "completion": demonstration}]
    result = check(
        prompts=prompts, fields={"demonstrations": rows}, max_completion_length=8, quiet=False
    )
    captured = capsys.readouterr()
    assert words in " ".join((captured.out + captured.err).split())
    assert all(flag in captured.err for flag in flags) and (result.exit_code == 0 or flags)


@pytest.mark.parametrize("answer", ["é", {"é": 1}, [["é"]]])
def test_characters_of_an_answer_that_the_tokenizer_lacks_are_counted(check, answer, capsys):
    rows = [{"prompt": f"{x}>", "answer": answer} for x in "abcd"]
    flags = check(fields={"train_prompts": rows}, quiet=False).flags
    assert "unknown-characters" in flags
    assert re.search(r"loses \d+ of .*'é'", " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("stop", [None, "<think>"])
def test_special_tokens_that_no_reward_sees_are_said_by_the_check_and_once_in_a_run(
    check_policy, tmp_path, capsys, stop
):
    """Unless they end completions."""
    policy = make_policy(kind="chat")
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    task = make_task()
    small = {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 8, "cpu": True}
    result = check_policy(policy, task, stop=stop, quiet=False)
    assert ("unread-tokens" in result.flags, result.exit_code) == (stop is None, 0)
    words = r"Completions hold special tokens \(<think>\), which the text of a completion leaves out: rewards"
    assert bool(re.search(words, " ".join(capsys.readouterr().out.split()))) == (stop is None)
    options = {"stop": stop, "max_steps": 3, "output_dir": tmp_path / "run", **small}
    tokenrl.train(model=policy, task=task, **options)
    printed = " ".join(capsys.readouterr().out.split())
    assert len(re.findall(words, printed)) == (stop is None)


def test_a_length_that_the_task_set_is_no_remark(check_policy):
    """All completions are cut, and rewards differ: only a limit that the user gave is worth a remark."""
    model, task = (make_model(eos_token_id=95), make_tokenizer("pad")), make_task()
    task.max_completion_length = 2
    options = {"max_steps": 2, "temperature": 0.2}
    assert check_policy(model, task, max_completion_length=None, **options).flags == ()
    assert check_policy(model, task, max_completion_length=2, **options).flags == ("truncation",)


def test_prompts_that_cannot_be_asked_are_counted_unless_they_may_be_cut(check, capsys):
    assert check(prompts=[*LETTERS, 14 * "a"], truncate_prompts=True).flags == ()
    fields = {"eval_prompts": [{"prompt": "ab>"}, {"prompt": 14 * "a"}]}
    assert check(fields=fields).eval_before == {}
    assert "1 of 2 held-out prompts cannot be asked" in problems(capsys)[0]
    chat = [{"role": "user", "content": "a"}]
    assert check(prompts=[*LETTERS, chat]).flags == ("prompts-refused",)
    refused = problems(capsys)[0]
    assert "1 of 17 training prompts cannot be asked. The first is that of row 16." in refused
    assert "has no chat template" in refused


def test_completions_that_never_end_are_a_problem_of_a_chat_model_asked_in_plain_text(
    check_policy, capsys
):
    """The model's weights forbid an end; only its tokenizer says how to ask it."""
    model = make_model(eos_token_id=95)
    for kind, code in (("chat", 2), ("pad", 0)):
        tokenizer = make_tokenizer(kind)
        options = {"max_completion_length": 2, "max_steps": 2, "temperature": 0.2}
        result = check_policy((model, tokenizer), **options)
        assert (result.exit_code, result.flags) == (code, ("truncation",))
        output = capsys.readouterr().err
        assert ("Every completion was cut at 2 tokens" in output and "--chat" in output) == (
            kind == "chat"
        )


def test_a_sampler_with_other_weights_and_a_policy_without_entropy_are_found(
    check_policy, monkeypatch, capsys
):
    def engine(policy, *_):
        made = Engine(policy)
        with torch.no_grad():
            for p in made.policy.model.parameters():
                p.mul_(1.1)
        made.sync = lambda policy: None
        return made

    monkeypatch.setattr(loop, "engine_of", lambda *_: engine)
    assert check_policy(make_policy()).flags == ("sampling-differs",)
    assert re.search(r"differ by 0\.\d+ nats per token, \d\S* at most", problems(capsys)[0])
    # Rounding to bfloat16 is worth a remark only where the user asked for it.
    chosen = "tokenrl.language.rollout.forward.choose_precision"
    monkeypatch.setattr(
        chosen, lambda args, *_: (args.mixed_precision or "bf16", "as the test says")
    )
    for precision, flags in (("bf16", ("sampling-differs",)), (None, ())):
        result = check_policy(make_policy(), mixed_precision=precision)
        assert (result.exit_code, result.flags) == (0, flags)
    assert "entropy-collapsed" in check_policy(make_policy(), temperature=1e-3).flags


def test_a_longrope_model_is_told_behind_how_many_tokens_its_positions_change(check_policy, capsys):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 12,
        "factor": 8.0,
    }
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    policy = make_policy(kind="chat", rope_parameters=rope | factors)
    assert check_policy(policy, max_completion_length=16).flags == ("sampling-differs",)
    assert re.search(
        r"at most\. In a text of more than 12 tokens .*--max-completion", problems(capsys)[0]
    )
