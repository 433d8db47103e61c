"""Runs that destroy their policy, have nothing to learn from, or learn nothing: when they say so, and how."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from folders import read_json
from refusals import stopped
from tiny_models import letter_task, letters, letters_trained

from tokenrl.advisor.diagnosis import advise_run
from tokenrl.files import verify
from tokenrl.runs import rules
from tokenrl.runs.metrics import read_metrics

DEMONSTRATIONS = [{"prompt": "ab>", "completion": "a"}]


def first_letter(prompts, completions, **_):
    return [float(text == prompt[0]) for prompt, text in zip(prompts, completions, strict=True)]


def nothing(completions, **_):
    return [0.0] * len(completions)


def train(folder, reward=first_letter, fields=(), **options):
    task = letter_task(reward, **{"max_completion_length": 3} | dict(fields))
    task.eval_prompts = task.train_prompts
    shape = {
        "max_steps": 12,
        "prompts_per_step": 16,
        "num_generations": 8,
        "eval_every": 0,
        "quiet": False,
    }
    return letters_trained(folder, task, **shape | options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy that is right about half of the time, and what training it left behind."""
    run = train(tmp_path_factory.mktemp("base") / "run", max_steps=30, quiet=True)
    assert run.eval_before["reward"] < 0.2 and run.eval_after["reward"] > 0.4
    assert run.flags == () and read_json(run.output_dir / "summary.json")["flags"] == []
    return run


def printed(capsys) -> str:
    """What was printed, problems of a check after the rest."""
    return " ".join("".join(capsys.readouterr()).split())


def test_a_destroyed_policy_is_told_at_its_step_and_at_the_end_and_is_saved(
    trained, tmp_path, capsys
):
    model = copy.deepcopy(trained.policy.model), trained.policy.tokenizer
    options = {"learning_rate": 0.3, "stop_after_zero_spread": 5, "max_steps": 40}
    with stopped("learning rate, 0.3, is the likely cause: try --learning-rate 0.0001") as caught:
        train(tmp_path, model=model, **options)
    output = printed(capsys)
    words = r"warning: step (\d+): The policy is destroyed: the mean reward fell"
    (step,) = re.findall(words, output)
    assert int(step) <= 5 and output.count("The policy is destroyed") == 1
    last = re.search(r"The last complete checkpoint is (\S+); --resume auto", str(caught.value))
    verify(Path(last[1]))
    summary = read_json(tmp_path / "summary.json")
    assert (summary["exit_reason"], summary["flags"]) == ("failed", ["policy-destroyed"])
    # not steps of which half the groups differ
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["idle_steps"] >= 5


def test_without_a_signal_or_an_end_a_run_says_so_and_its_end_is_not_plain(tmp_path, capsys):
    model, tokenizer = letters()
    tokenizer.eos_token = model.config.eos_token_id = model.generation_config.eos_token_id = None
    result = train(tmp_path / "run", nothing, model=(model, tokenizer), max_steps=6)
    assert (result.exit_reason, result.flags) == ("finished", ("nothing-learnt", "constant-answer"))
    output = printed(capsys)
    assert output.count("step 1: Every completion was cut at 3 tokens") == 1
    assert output.count("warning: step 3: In 3 steps in a row no two rewards that are") == 1
    assert "finished (nothing-learnt), 6 steps" in output
    assert "held-out reward was 0 before training, and has changed by 0 ± 0" in output
    assert "In 100% of the steps no two rewards" in output


def test_a_signal_that_is_lost_is_told_from_one_that_never_was(tmp_path):
    falling = Scripted(lambda call, texts: [float("a" in text and call <= 5) for text in texts])
    lost = r"nothing to learn from: the mean reward is 0, down from 0\.\d+ before training\. The learning rat"
    with stopped(lost):
        train(tmp_path / "run", falling, prompts_per_step=1, stop_after_zero_spread=5)
    with stopped(r"the mean reward is 0\. \S"):
        train(tmp_path / "never", nothing, stop_after_zero_spread=5)


def test_rounding_is_neither_a_fall_nor_a_success(tmp_path):
    """The mean of equal rewards of -0.2 is another number of steps than of evaluations."""
    for value in (-0.2, 0.7):
        with stopped(rf"nothing to learn from: the mean reward is {value}\. \S"):
            same = lambda completions, **_: [value] * len(completions)  # noqa: B023, E731
            train(tmp_path / str(value), same, stop_after_zero_spread=5, prompts_per_step=6)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"demonstrations": DEMONSTRATIONS}, "add --warm-start"),
        ({"max_completion_length": 1}, "cut at 1 tokens, before an end: raise --max-completion-le"),
    ],
)
def test_a_check_without_a_signal_says_what_helps(tmp_path, capsys, fields, remedy):
    result = train(tmp_path / "run", nothing, fields, check=True, learning_rate=None)
    assert (result.exit_code, result.flags) == (2, ("no-signal",))
    assert remedy in printed(capsys)


def test_who_already_solves_the_prompts_is_not_told_to_learn_them(tmp_path, capsys, monkeypatch):
    """Nor, where the task says what counts as solved, that the policy is too sure of its answers."""
    monkeypatch.setattr(rules, "LEAST_ENTROPY", 99.0)
    right = Scripted(lambda call, texts: [1.0] * len(texts))
    fields = {"solved": 0.9, "demonstrations": DEMONSTRATIONS}
    assert train(tmp_path / "run", right, fields, max_steps=3).flags == ("nothing-learnt",)
    output = printed(capsys)
    assert output.count("The policy already solves these prompts") == 2  # third step, end
    assert "--warm-start" not in output


def test_a_gain_within_noise_is_told_and_a_real_one_is_not_hidden_by_hard_prompts(tmp_path, capsys):
    few_steps = train(tmp_path / "run", max_steps=5)
    assert few_steps.flags == ("nothing-learnt", "constant-answer")
    assert few_steps.eval_before["reward"] < few_steps.eval_after["reward"]
    assert "It is no gain beyond noise. More steps" in printed(capsys)


@pytest.mark.parametrize(("solved", "reason"), [(0.9, "stuck"), (None, "learnt")])
def test_equal_rewards_below_what_counts_as_solved_are_no_success(tmp_path, said, solved, reason):
    """From 0 to .25 for all: a policy that writes the same letter whatever the prompt."""
    better = Scripted(lambda call, texts: [0.25 * (call > 4)] * len(texts))
    steps = []
    callback = lambda step, _: steps.append(step)  # noqa: E731
    options = {"stop_after_zero_spread": 3, "callback": callback}
    result = train(tmp_path, better, {"solved": solved}, **options)
    assert (result.exit_reason, result.exit_code, steps) == (reason, 0, [1, 2, 3])
    assert (tmp_path / "model" / "model.safetensors").exists()
    is_told = "the policy is stuck. The mean reward is 0.25, and 0.9 counts" in said()
    assert is_told == (reason == "stuck")


@pytest.mark.parametrize("reward", [1.0, 0.0])
def test_without_sampled_evaluations_the_first_step_shows_what_was_learnt(tmp_path, reward):
    def settled(call, texts):
        mixed = call == 2  # the first step, after the evaluation
        return [float(i % 2) if mixed else reward for i in range(len(texts))]

    options = {"eval_generations": 0, "stop_after_zero_spread": 3}
    if reward:
        assert train(tmp_path, Scripted(settled), **options).exit_reason == "learnt"
        return
    with stopped("no two rewards that are compared differed"):
        train(tmp_path, Scripted(settled), **options)


def test_a_judge_that_abstains_is_counted_and_told(tmp_path):
    """Of four completions of a prompt it answers three; leaving the fourth out changes the mean reward."""
    judge = Scripted(lambda call, texts: [None if i % 4 == 0 else 1.0 for i in range(len(texts))])
    base = Scripted(lambda call, texts: [1.0 + i % 2 for i in range(len(texts))])
    judge.__name__, base.__name__ = "judge", "base"
    options = {"max_steps": 2, "on_abstain": "leave-out", "num_generations": 4}
    train(tmp_path, [base, judge], **options)
    step = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert (step["rewards/judge/abstained"], step["rewards/base/abstained"]) == (0.25, 0)
    assert step["reward"] == pytest.approx(8 / 3)
    assert step["frac_rows_abstained"] == 0.25
    warnings = " ".join(read_json(tmp_path / "summary.json")["warnings"])
    assert warnings.count("judge gave no reward to 25%") == 1
    assert "they teach nothing" in warnings and "counts as 0" not in warnings


class Scripted:
    """A reward that follows from the number of its call and from the completions."""

    __name__ = "scripted"

    def __init__(self, rewards):
        self.calls, self.rewards = 0, rewards

    def __call__(self, completions, **_):
        self.calls += 1
        return self.rewards(self.calls, completions)


def test_a_greedy_reward_that_falls_while_samples_gain_is_a_flag(tmp_path, said):
    means = 0.8, 0.07, 0.07, 0.08, 0.1, 0.09
    reward = Scripted(
        lambda call, texts: [means[call - 1] + i % 4 / 100 for i in range(len(texts))]
    )
    assert train(tmp_path, reward, max_steps=2).flags == ("greedy-fell",)
    output = said()
    assert "earn 0.815, the best of 4 samples 0.1, all samples 0.085" in output
    assert "warning: greedy-fell: The greedy reward has fallen from its best, 0.8" in output
    assert "--keep best" in str(advise_run(str(tmp_path)).findings)
    assert "greedy reward has fallen" in (tmp_path / "report.html").read_text()


def test_a_run_that_learns_its_prompts_by_heart_says_so(tmp_path, said):
    evaluations = 1, 2, 7, 8, 13, 14, 19, 20  # the calls of greedy completions and of samples
    held_out = dict(zip(evaluations, (0.5, 0.25, 0.5, 0.5, 0.5, 0.375, 0.5, 0.375), strict=True))

    def reward(call, texts):
        share = held_out.get(call, 0.25 + 0.625 * call / 18)
        return [float(i % 8 < 8 * share) for i in range(len(texts))]

    result = train(tmp_path, Scripted(reward), eval_every=4, eval_generations=8)
    assert result.flags == ("learnt-by-heart",)
    output = said()
    assert "held-out prompts went from 0.25 to 0.375; its best was 0.5, at step 4." in output
    assert "The policy learns its training prompts by heart. Give more distinct" in output
    assert "learnt-by-heart" in str(advise_run(str(tmp_path)).findings)
