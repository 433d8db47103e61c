"""Noise of the arms' gradients at checkpoints of a run: what `tokenrl lab measure` finds, for each arm."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from made_up import plan, record

import tokenrl
from tokenrl.lab.compare import checkpoints, noise
from tokenrl.lab.compare.arms import read_arm
from tokenrl.lab.compare.checkpoints import checkpoints_of, noise_of_runs
from tokenrl.lab.compare.noise import GradientNoise, measure_noise
from tokenrl.lab.compare.planning import runs_of
from tokenrl.lab.compare.problems import control_problem, language_problem
from tokenrl.lab.compare.statistics.found import Interval
from tokenrl.lab.measure.measurement import measure_gradients
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.settings import field_types
from toy_tasks.models import character_tokenizer, tiny_llama

SHAPE = {"prompts_per_step": 8, "num_generations": 8, "max_completion_length": 4}


def arms_of(*texts):
    return [read_arm(text, {}, list(field_types(TrainArguments))) for text in texts]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(noise, "PROMPTS", 32)
    monkeypatch.setattr(noise, "STEPS", 4)
    monkeypatch.setattr(noise, "PROBES", 32)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny model whose weights nobody has trained, and a reward that is 1 more than one would expect."""
    folder = tmp_path_factory.mktemp("noise")
    tokenizer = character_tokenizer("0123456789 >")
    tiny_llama(tokenizer, layers=1, hidden=16, heads=2, context=32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    code = "def reward(completions, **_):\n    return [1 + len(x.strip('02468')) for x in completions]\n"
    (folder / "mine.py").write_text(code)
    return {
        "task": "sort_digits",
        "model": str(folder / "model"),
        "reward": f"{folder}/mine.py:reward",
        **SHAPE,
    }


@pytest.fixture(scope="module")
def problem(given):
    return language_problem("sort_digits", given, print)


def test_it_is_the_noise_that_the_lab_measures(given, problem):
    arms = arms_of("reinforce", "rloo", "rloo,num_generations=4", "grpo")
    found = {one.arm: one for one in measure_noise(problem, arms, {"before training": None})}
    measured = measure_gradients(
        **{**given, "estimators": ("reinforce", "rloo", "grpo"), "num_prompts": 32, "probes": 32}
    )
    for one in measured.estimators:
        mine = found[one.estimator]
        assert mine.noise == pytest.approx((one.noise.value, one.noise.low, one.noise.high))
        assert mine.cosine == pytest.approx((one.cosine.value, one.cosine.low, one.cosine.high))
        assert mine.note == ""
    sizes = {(s.estimator, s.group_size): s.noise.value for s in measured.group_sizes}
    assert found["rloo,num_generations=4"].noise.value == pytest.approx(sizes["rloo", 4])
    assert found["reinforce"].noise.value > 2 * found["rloo"].noise.value, "rewards are shifted by 1"


def test_an_arm_that_cannot_be_measured_says_why(problem):
    arms = arms_of("rloo", "rloo,temperature=0.5", "rloo,num_generations=3")
    rloo, cold, three = measure_noise(problem, arms, {"before training": None})
    assert math.isfinite(rloo.noise.value)
    assert math.isnan(cold.noise.value) and "it differs in temperature" in cold.note
    assert math.isnan(three.noise.value) and "cannot be divided into groups of 3" in three.note


def test_checkpoints_are_those_of_the_beginning_the_middle_and_the_end(given, problem, tmp_path):
    run = tmp_path / "run"
    options = {**given, "max_steps": 4, "eval_size": 4, "learning_rate": 0.1, "quiet": True}
    tokenrl.train(**options, save_every=2, keep_checkpoints=2, output_dir=str(run))
    places = checkpoints_of(run)
    assert list(places) == ["before training", "half way", "end"]
    assert places["half way"].name == "step_000002"
    same = {"before training": None, "as saved": given["model"]}
    (one, two), found = (measure_noise(problem, arms_of("rloo"), p) for p in (same, places))
    assert one.noise == two.noise
    assert len({one.noise.value for one in found}) == 3, "each has its own weights"
    assert checkpoints_of(tmp_path) == {}


def test_environments_are_not_measured():
    assert measure_noise(control_problem("bandit", {"env": "bandit"}), arms_of("rloo"), {"x": None}) == ()


NUMBER = Interval(1 / 3, 0.1, math.inf)


@pytest.fixture
def one_run(tmp_path, monkeypatch):
    """A comparison whose reference has a finished run, and the calls that measure its noise."""
    planned, calls = plan(("reinforce", "rloo"), seeds=6), []
    runs = {("sort_digits", arm.label): comparison_runs(planned, arm.label) for arm in planned.arms}
    (tmp_path / runs["sort_digits", "reinforce"][0].run.path).mkdir(parents=True)
    (tmp_path / runs["sort_digits", "reinforce"][0].run.path / "summary.json").write_text('{"steps": 4}')

    def measured(on, arms, places):
        calls.append(places)
        return tuple(GradientNoise(on.label, "half way", arm.label, NUMBER, NUMBER) for arm in arms)

    monkeypatch.setattr(checkpoints, "measure_noise", measured)
    return (planned, runs, tmp_path, print), calls


def comparison_runs(planned, arm):
    return [record(run, planned.problems[0], 0.9) for run in runs_of(planned) if run.arm == arm]


def test_it_is_measured_once_for_a_comparison(one_run):
    given, calls = one_run
    found = noise_of_runs(*given)
    assert noise_of_runs(*given) == found and len(found) == 2 and len(calls) == 1
    noise_of_runs(replace(given[0], arms=plan(("reinforce", "grpo")).arms),
                  {**given[1], ("sort_digits", "grpo"): []}, *given[2:])  # fmt: skip
    assert len(calls) == 2, "another arm"
    (given[2] / checkpoints.FILE).write_text("{")
    assert noise_of_runs(*given) == found and len(calls) == 3


def test_a_failure_to_measure_is_a_note(one_run, monkeypatch):
    given, _ = one_run

    def fails(*_):
        raise NotImplementedError("no forward-mode derivative")

    monkeypatch.setattr(checkpoints, "measure_noise", fails)
    found = noise_of_runs(*given)
    assert [one.arm for one in found] == ["reinforce", "rloo"]
    assert all(one.note == "not measured: NotImplementedError: no forward-mode derivative" for one in found)
    assert all(math.isnan(one.noise.value) for one in found)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints, "measure_noise", lambda *_: ())
    assert noise_of_runs(*given) == (), "it is tried again"
