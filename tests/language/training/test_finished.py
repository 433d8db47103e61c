"""Code of the user's ends a run by `Finished`; states are those of a run that goes on, and evaluations spend none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
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


def count_of_a(completions, **_):
    return [float(text.count("a")) for text in completions]


class Counting:
    """A reward that counts its completions."""

    __name__ = "counting"
    count = 0

    def __call__(self, completions, **_):
        self.count += len(completions)
        ended("reward", self.count > 2 * 16)
        return count_of_a(completions)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


ending = ""
"""What ends the run in its third step, at the third call of some things that are called once a step."""


def ended(place, in_time=True):
    if place == ending and in_time:
        raise Finished(f"the {place} has enough")


class Thrice:
    """Counts calls, and ends the run in the third one."""

    def __init__(self, place):
        self.place, self.calls = place, 0

    def __call__(self):
        self.calls += 1
        ended(self.place, self.calls >= 3)


class Memory(RunningMean):
    def __init__(self):
        super().__init__(0.9)
        self.updated = Thrice("memory")

    def update(self, keys, rewards):
        super().update(rewards)
        self.updated()


class Engine(TransformersGenerator):
    def __init__(self, policy, rows_at_once):
        super().__init__(policy, rows_at_once)
        self.steps, self.synced = Thrice("engine"), Thrice("weights of the engine")

    def generate(self, prompt_ids, sampling, draws):
        self.steps()
        return super().generate(prompt_ids, sampling, draws)

    def sync(self, policy):
        super().sync(policy)
        self.synced()


class Game:
    """An episode of one turn; those of a step are reset together."""

    def reset(self, seed=None):
        ended("environment", Game.resets >= 2 * 16)
        Game.resets += 1
        return "ab>", {}

    async def step(self, text):
        ended("step of the environment", Game.resets > 2 * 16)
        return "", float(text.count("a")), True, False, {}


class Weights:
    """Equal weights; they are computed before the first step and after each."""

    __name__ = "weights"

    def __init__(self):
        self.computed = Thrice("weights")

    def __call__(self, completions, means, variances):
        self.computed()
        return means * 0 + 1


class Context:
    """What a teacher reads, by a call for each row."""

    __name__ = "context"
    calls = 0

    def __call__(self, prompt):
        ended("context", self.calls >= 2 * 16)
        self.calls += 1
        return f"a{prompt}"


def run_of(folder, place, **options):
    """A run of at most five steps that code of some kind ends; engine, weights and callback may."""
    global ending
    ending = place
    Game.resets = 0
    options = {"estimator": Estimator(baseline=Memory), "prompt_weights": Weights()} | options
    options = {"generator": Engine, "max_steps": 5, "save_every": 1} | options
    return letters_trained(folder, letter_task(Counting()), keep_checkpoints=9, **options)


IN_EPISODES = {"environment": Game, "prompt_weights": "uniform", "generator": "transformers"}
OF_TEACHER = {"estimator": Estimator(beta=0.5, kl_placement="loss"), "teacher": "self"}
OF_TEACHER |= {"teacher_context": Context(), "prompt_weights": "uniform"}
PLACES = {
    "reward": (2, {}),
    "engine": (2, {}),
    "environment": (2, IN_EPISODES),
    "step of the environment": (2, IN_EPISODES),
    "context": (2, OF_TEACHER),
    "weights of the engine": (2, {}),  # it is called before the first step too
    "memory": (3, {}),
    "weights": (1, {}),  # at its start a run tries its states
}
"""By what ends the run: the steps that are made, and its settings."""


@pytest.mark.parametrize("place", PLACES)
def test_what_ends_a_run_in_a_step_leaves_the_step_out_or_lets_it_be_completed(tmp_path, place):
    """Weights and states are those of a run that goes on; a memory has been updated once the policy has moved."""
    steps, options = PLACES[place]
    run = run_of(tmp_path / "run", place, **options)
    assert (run.exit_reason, run.reason) == ("finished", f"the {place} has enough")
    assert (run.exit_code, run.steps, run.metrics[-1]["step"]) == (0, steps, steps)
    OF_TEACHER["teacher_context"].calls = 0
    run_of(tmp_path / "whole", "", **options)
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    lost = {"prompts/effective", "baseline"} - run.metrics[-1].keys()  # what they would have been
    assert run.metrics[:-1] == whole[:steps]
    assert run.metrics[-1] == {name: x for name, x in whole[steps].items() if name not in lost}
    names = ("learner", "memory", "stream", "rewards", "run")
    name = f"checkpoints/step_{steps:06d}"
    now, then = (state_of(tmp_path / folder / name) for folder in ("run", "whole"))
    assert [now.get(name) for name in names] == [then.get(name) for name in names]


def stop_at_three(step, metrics):
    return step == 3


def finish_at_three(step, metrics):
    if step == 3:
        raise Finished("three")


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("callback", {"callback": stop_at_three}),
        ("finished", {"callback": finish_at_three}),
        ("finished", {"max_steps": 3}),
    ],
)
def test_a_state_at_the_end_of_a_run_is_that_of_a_run_that_goes_on(tmp_path, reason, options):
    """The evaluation that is made because the run ends spends what the reward counts after that."""

    def run(name, **options):
        shape = {"max_steps": 5, "eval_every": 2, "keep_checkpoints": 9, "save_every": 1}
        task = letter_task(Counting())
        result = letters_trained(tmp_path / name, task, **shape | options)
        return result, state_of(tmp_path / name / "checkpoints" / "step_000003")

    result, state = run("ended", **options)
    _, undisturbed = run("whole")
    assert (result.exit_reason, result.steps) == (reason, 3) and result.eval_after
    for name in ("rewards", "stream", "learner", "run", "best"):
        assert state.get(name) == undisturbed.get(name), name
    run("ended", resume="auto")
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("ended", "whole")]
    assert logs[0] == logs[1]
