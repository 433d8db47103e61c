"""Runs in an environment at the command line: trained, checked, evaluated, sampled, reported and refused."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

from tokenrl.cli import main
from tokenrl.errors import Refused
from tokenrl.language.evaluation.best_of_n import best_of_n_metrics
from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.policy.model import load_policy
from tokenrl.language.preferences.sampled import make_preferences
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.episodes import ENDINGS
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import PromptTask, find_task
from tokenrl.runs.reader import read_run

ENVIRONMENT = '''
class Talk:
    """Says <b>; a turn is worth its digits, and one with a q ends the episode."""

    def reset(self, seed=None):
        return f"<{seed % 10}>", {}

    def step(self, text):
        digits = float(sum(letter.isdigit() for letter in text))
        return "<b>\\n", digits, "q" in text, False, {}


class Away(Talk):
    """Its service is away."""

    def step(self, text):
        raise OSError("no connection")


def long(completions, **_):
    return [float(len(text)) for text in completions]
'''
STOP = "abcdefghijklmnop"
SMALL = ["--model", "tiny", "--max-turns", "3", "--max-completion-length", "24", "--stop", *STOP]
SMALL += [
    "--max-steps",
    "2",
    "--prompts-per-step",
    "4",
    "--num-generations",
    "4",
    "--eval-size",
    "6",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run in an environment, beside the file that defines it."""
    folder = tmp_path_factory.mktemp("talk")
    (folder / "talk.py").write_text(ENVIRONMENT)
    command = ["train", "--task", f"{folder}/talk.py:Talk", *SMALL, "--output-dir", f"{folder}/run"]
    assert main([*command, "--quiet"]) == 0
    return folder / "run"


def test_a_run_records_episodes_and_its_page_shows_them_as_chats(run):
    recorded = read_run(run)
    assert (
        recorded.config["task"] == f"{run.parent}/talk.py:Talk"
        and recorded.config["max_turns"] == 3
    )
    row = recorded.completions()[0]
    turns = json.loads(row["messages"])
    assert row["prompt"][0] + row["prompt"][2] == "<>" and row["ending"] in ENDINGS
    assert {turn["role"] for turn in turns[::2]} == {"assistant"} and row["failure"] is None
    answers = [turn["content"] for turn in turns[1::2]]
    assert answers == ["<b>\n"] * len(answers)
    assert [row["prompt"][1] for row in recorded.completions()[:4]] == [row["prompt"][1]] * 4
    page = (run / "report.html").read_text()
    assert (
        '<div class="message user"><span class="label">user</span><div class="text">&lt;b&gt;'
        in page
    )
    assert '<div class="message assistant">' in page and "<b>\n" not in page
    assert (
        '<span class="label">completion</span>' in page
        and '<span class="label">messages</span>' not in page
    )
    assert recorded.metrics[-1]["eval_episodes/turns"] > 0


def test_it_is_evaluated_and_sampled_as_it_was_trained(run, capsys, monkeypatch):
    numbers = run.parent / "numbers.json"
    command = ["evaluate", "--model", str(run), "--json", str(numbers), "--num-generations", "2"]
    command += ["--best-of", "2", "--reference", str(run), "--reward", f"{run.parent}/talk.py:long"]
    assert main(command) == 0
    assert "mean number of turns of an episode" in " ".join(capsys.readouterr().out.split())
    metrics = json.loads(numbers.read_text())
    of_episodes = {name: value for name, value in metrics.items() if name.startswith("episodes/")}
    turns = of_episodes.pop("episodes/turns")
    assert 1 < turns <= 3 and sum(of_episodes.values()) == pytest.approx(1)
    assert abs(metrics["kl"]) < 1e-4
    # the task's own reward measures what the other one chose
    assert metrics["best_of_n_proxy@2"] >= metrics["best_of_n_proxy@1"] != metrics["best_of_n@1"]
    assert main(["sample", "--model", str(run), "--prompt", "", "7", "--num-generations", "1"]) == 0
    out, output = capsys.readouterr()
    assert out.count("episode\nprompt     <") == 2 and "7<" not in out and "\nending     " in out
    assert (
        output.count("Talk begins its episodes itself, so they are played without that prompt") == 1
    )
    assert out.count("\nuser       <b>") >= 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    assert main(["sample", "--model", str(run), "--num-generations", "0"]) == 0
    assert capsys.readouterr().out.count("episode\nprompt") == 2  # an empty line plays one too


def test_best_of_n_is_measured_by_what_the_environment_gave(run):
    policy = load_policy(run / "model")
    args = TaskArguments(task=f"{run.parent}/talk.py:Talk", max_turns=3, eval_size=6)
    task, gold = find_task(args)
    policy.ask(PromptArguments(stop=tuple(STOP)))
    choosing = Rewards(
        [lambda completions: list(map(len, completions))], environments=gold.environments
    )
    metrics = best_of_n_metrics(policy, task.eval_prompts, choosing, gold, Sampling(24, 4))
    own = best_of_n_metrics(policy, task.eval_prompts, gold, gold, Sampling(24, 4))
    assert (
        metrics["best_of_n@1"] == pytest.approx(own["best_of_n@1"]) != metrics["best_of_n_proxy@1"]
    )
    assert own["best_of_n@4"] == own["best_of_n_proxy@4"] > own["best_of_n@1"]


def test_a_check_shows_the_first_episode_and_what_fails(run, tmp_path, capsys):
    command = ["train", "--check", *SMALL, "--output-dir", str(tmp_path / "new"), "--task"]
    main([*command, f"{run.parent}/talk.py:Talk"])
    out, error = capsys.readouterr()
    printed = out[out.index("The first of these episodes:") :]
    assert "\nprompt     <" in printed and "\nassistant  " in printed and "\nending     " in printed
    assert "few" not in error and "step-failed" not in error
    shorter = ["--max-completion-length", "2", "--max-turns", "1"]
    assert main([*command, f"{run.parent}/talk.py:Talk", *shorter]) == 2
    cut = r"\d\d% of the completions are cut off at 2 tokens. Raise --max-completion-length"
    assert re.search(cut, " ".join(capsys.readouterr().err.split()))
    assert main([*command, f"{run.parent}/talk.py:Away"]) == 2
    output = r"abstained from every completion of this step. \d+ of \d+ episodes failed. Away.step raised OSError"
    assert re.search(output, capsys.readouterr().err)


@pytest.mark.slow
def test_equal_prompts_are_no_fault_where_an_environment_begins_the_episodes(run, capsys):
    folder, rows = run.parent, [{"prompt": ""}] * 8
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}"}) + "\n" for n in range(9))
    )
    shape = [
        *SMALL,
        "--environment",
        f"{folder}/talk.py:Talk",
        "--estimator",
        "reinforce_timestep_mean",
    ]
    command = ["train", "--task", f"{folder}/rows.jsonl", *shape, "--output-dir", f"{folder}/rows"]
    assert main(command) == 0  # whose baseline compares turns, and so needs rewards in time
    out = capsys.readouterr().out
    assert "distinct prompts" not in out and "episodes/turns" in out
    task = PromptTask(
        "mine", rows, rows, [], environment=find_task(TaskArguments(task=shape[-3]))[0].environment
    )
    assert find_task(TaskArguments(task=task))[1].names == ["Talk"]


@pytest.mark.parametrize(
    ("command", "purpose"),
    [
        (["lab", "measure"], "lab measure"),
        (["reward-model", "--output-dir", "OUT"], "A reward model"),
    ],
)
def test_what_needs_a_single_turn_refuses_an_environment(run, tmp_path, capsys, command, purpose):
    words = [word.replace("OUT", str(tmp_path / "new")) for word in command]
    assert main([*words, "--task", f"{run.parent}/talk.py:Talk", "--model", "tiny"]) == 2
    _, gold = find_task(TaskArguments(task=f"{run.parent}/talk.py:Talk"))
    with pytest.raises(Refused, match="A pair of completions needs completions of one turn"):
        make_preferences(load_policy(run / "model"), [{"prompt": "a"}], gold, Sampling(4, 2))
    expected = (
        f"{purpose} needs completions of one turn, and Talk answers them: name a task without"
    )
    assert expected in capsys.readouterr().err
