"""Code of the user's ends a run by `Finished`; states are those of a run that goes on, and evaluations spend none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from folders import read_json, write_rows
from tiny_models import letter_task, letters_trained

from tests.states import state_of
from tokenrl import Estimator
from tokenrl.cli import main
from tokenrl.core.memories import RunningMean
from tokenrl.errors import Finished
from tokenrl.language import TransformersGenerator
from tokenrl.runs.checkpoint import checkpoints
from tokenrl.runs.metrics import read_metrics

FILE = """
import os, signal
from pathlib import Path
import tokenrl

class Scorer:
    \"\"\"Scores 22 completions; one that it has scored before earns half.\"\"\"
    __name__ = "scorer"
    def __init__(self):
        self.seen = []
    def __call__(self, completions, **rows):
        rewards = []
        for text in completions:
            if len(self.seen) >= 22:
                raise tokenrl.Finished("22 completions scored")
            rewards.append((1 + text.count("a")) / (2 if text in self.seen else 1))
            self.seen.append(text)
            mark = Path(f"killed_{len(self.seen)}")
            if mark.name in os.environ.get("KILLS", "").split() and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return rewards
    def state_dict(self):
        return {"seen": self.seen}
    def load_state_dict(self, state):
        self.seen = state["seen"]

scorer = Scorer()

async def enough(completions, trainer_state, **rows):
    if trainer_state.global_step == 2:
        raise tokenrl.Finished("enough")
    return [text.count("a") / 9 for text in completions]
"""
QUICK = """train --task rows.jsonl --cpu --max-steps 9 --prompts-per-step 2 --num-generations 2 --eval-size 2
--save-every 1 --max-completion-length 6 --threads 1 --eval-generations 0 --quiet --output-dir run"""


@pytest.fixture
def argv(saved, workplace):
    (workplace / "mine.py").write_text(FILE)
    rows = [{"prompt": word} for word in ("the cat", "a dog", "the mat", "on", "the log", "sat")]
    write_rows(workplace / "rows.jsonl", rows)
    return [*QUICK.split(), "--model", str(saved()), "--reward"]


def steps() -> list[dict]:
    return [row for row in read_metrics(Path("run/metrics.jsonl")) if row["step"]]


def last_state() -> dict:
    """The state in the newest checkpoint of the run."""
    return state_of(checkpoints(Path("run/checkpoints"))[-1])


def process(argv: list[str], kills: str = "") -> int:
    """The exit code of a process of its own, whose modules and scorer are new."""
    command = [sys.executable, "-m", "tokenrl", *argv]
    return subprocess.run(command, env={**os.environ, "KILLS": kills}, check=False).returncode


@pytest.mark.parametrize("form", ["", "--reward-timeout 60", "--on-reward-error abstain"])
def test_a_reward_ends_the_run_before_the_step_that_it_breaks_off(argv, form):
    argv = [*argv, "length(target=3)", "mine.py:enough", "--eval-every", "0", *form.split()]
    assert main(argv) == 0
    summary = read_json("run/summary.json")
    assert (summary["exit_reason"], summary["reason"]) == ("finished", "enough")
    assert [row["step"] for row in steps()] == [1, 2] and summary["steps"] == 2
    assert Path("run/model/model.safetensors").exists()


@pytest.mark.slow
def test_a_budget_ends_a_run_alike_whether_it_is_killed_or_not(argv):
    argv = [*argv, "mine.py:scorer", "--resume", "auto"]
    assert process(argv) == 0
    whole = steps(), last_state()["rewards"], last_state()["stream"]
    assert len(whole[0]) == 5 and len(whole[1]["scorer"]["seen"]) == 20  # the sixth would need 24
    summary = read_json("run/summary.json")
    assert summary["eval_before"] == summary["eval_after"] == {}
    Path("run").rename("whole")
    kills = "killed_3 killed_16 killed_21"
    assert [process(argv, kills) for _ in range(4)] == [-9, -9, -9, 0]
    assert process(argv) == 0  # ends again at once
    assert (steps(), last_state()["rewards"], last_state()["stream"]) == whole
    assert read_json("run/summary.json")["reason"] == "22 completions scored"


def test_a_check_spends_nothing_of_what_a_reward_counts(tmp_path):
    class Scorer:
        count = 5

        def __call__(self, completions, **rows):
            self.count += len(completions)
            return [0.0, 1.0] * (len(completions) // 2)

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    scorer = Scorer()
    check = letters_trained(tmp_path / "run", letter_task(scorer), check=True)
    assert (check.exit_reason, scorer.count) == ("check", 5)


def test_the_state_dict_of_a_reward_changes_no_settings(tmp_path):
    class Meddling:
        def __call__(self, completions, **rows):
            seen.add(torch.get_num_threads())
            return [float(len(text)) for text in completions]

        def state_dict(self):
            torch.set_num_threads(threads + 1)
            return {}

        def load_state_dict(self, state):
            torch.set_num_threads(threads + 1)

    seen, threads = set(), torch.get_num_threads()
    letters_trained(tmp_path / "run", letter_task(Meddling()), max_steps=1)
    assert seen == {threads}


def test_evaluations_spend_what_a_reward_counts_only_where_they_are_asked_for(argv, refusal):
    argv = [*argv, "mine.py:scorer"]
    assert "needs evaluations" in refusal(*argv, "--keep", "best")
    assert "has a state_dict" in " ".join(refusal(*argv, "--reward-timeout", "9").split())
    assert main([*argv, "--eval-every", "2"]) == 0
    # Two prompts before training, four completions a step; the fourth step's evaluation is the last it pays.
    assert read_json("run/summary.json")["reason"] == "22 completions scored"
    assert len(last_state()["rewards"]["scorer"]["seen"]) == 2 + 4 * 4 + 2 * 2


def test_an_evaluation_that_a_reward_ends_has_spent_nothing(argv):
    argv[argv.index("--eval-generations") + 1] = "2"
    assert main([*argv, "mine.py:scorer", "--eval-every", "1"]) == 0
    # Six completions in an evaluation, and four in a step: the evaluation after the second step would need 26.
    assert [("eval_reward_greedy" in row) for row in steps()] == [True, False]
    assert len(last_state()["rewards"]["scorer"]["seen"]) == 6 + (4 + 6) + 4


calls: Counter[str] = Counter()
last_calls: dict[str, int] = {}


def called(place):
    """Count a call of the user's code, and end the run in the last one."""
    calls[place] += 1
    if calls[place] == last_calls.get(place):
        raise Finished(f"{place} has enough")


class Counting:
    """A reward that counts its completions."""

    count = 0

    def __call__(self, completions, **_):
        self.count += len(completions)
        called("reward")
        return [float(text.count("a")) for text in completions]

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Memory(RunningMean):
    def update(self, keys, rewards):
        super().update(rewards)
        called("memory")


class Engine(TransformersGenerator):
    def generate(self, *of):
        called("engine")
        return super().generate(*of)

    def sync(self, policy):
        super().sync(policy)
        called("engine's weights")


class Game:
    def reset(self, seed=None):
        called("environment")
        return "ab>", {}

    async def step(self, text):
        called("turn")
        return "", float(text.count("a")), True, False, {}


def weighted(completions, means, variances):
    called("weights")
    return means * 0 + 1


def context(prompt):
    called("context")
    return prompt


OF_TEACHER = {"estimator": Estimator(beta=0.5, kl_placement="loss"), "teacher": "self"}
PLACES = {
    "reward": (3, 2, {}),
    "engine": (3, 2, {"generator": Engine}),
    "environment": (33, 2, {"environment": Game}),
    "turn": (18, 2, {"environment": Game}),
    "context": (33, 2, OF_TEACHER | {"teacher_context": context}),
    "engine's weights": (3, 2, {"generator": Engine}),  # the first call is before the first step
    "memory": (3, 3, {"estimator": Estimator(baseline=Memory)}),
    "weights": (3, 4, {"prompt_weights": weighted}),  # called for each pass of four steps
}
"""By what ends the run: its last call, the steps that are made then, and the settings. A step has 16 episodes."""
PARTS = ("learner", "memory", "stream", "rewards", "run", "best")


def run_of(folder, shape):
    """A run, and a function that returns the parts of the state that it saved after a step."""
    calls.clear()
    shape = {"save_every": 1, "keep_checkpoints": 9, "max_steps": 5} | shape
    run = letters_trained(folder, letter_task(Counting()), **shape)

    def state(step):
        saved = state_of(folder / "checkpoints" / f"step_{step:06d}")
        return [saved.get(name) for name in PARTS]

    return run, state


@pytest.mark.parametrize("place", PLACES)
def test_what_ends_a_run_in_a_step_leaves_it_out_or_lets_it_be_completed(
    tmp_path, monkeypatch, place
):
    """It is left out unless the policy has moved. States are those of a run that goes on."""
    number, steps, options = PLACES[place]
    whole, undisturbed = run_of(tmp_path / "whole", options)
    monkeypatch.setitem(last_calls, place, number)
    run, state = run_of(tmp_path / "run", options)
    assert (run.exit_reason, run.reason) == ("finished", f"{place} has enough")
    assert (run.exit_code, run.steps, len(run.metrics)) == (0, steps, steps + 1)
    assert run.metrics[-1].items() <= whole.metrics[steps].items()
    assert run.metrics[:-1] == whole.metrics[:steps] and state(steps) == undisturbed(steps)


def finish_at_three(step, metrics):
    if step == 3:
        raise Finished("three")


ENDS = [{"callback": lambda step, _: step == 3}, {"callback": finish_at_three}, {"max_steps": 3}]


@pytest.mark.parametrize("end", ENDS)
def test_a_state_at_the_end_of_a_run_is_that_of_a_run_that_goes_on(tmp_path, end):
    """The evaluation that is made because the run ends spends what the reward counts after that."""
    whole, undisturbed = run_of(tmp_path / "whole", {"eval_every": 2})
    run, state = run_of(tmp_path / "run", {"eval_every": 2} | end)
    assert (run.steps, bool(run.eval_after)) == (3, True) and state(3) == undisturbed(3)
    assert run_of(tmp_path / "run", {"eval_every": 2, "resume": "auto"})[0].metrics == whole.metrics
