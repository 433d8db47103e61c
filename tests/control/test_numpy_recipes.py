"""The arithmetic of the NumPy recipes, and that an interrupt keeps what was finished."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tokenrl.control.numpy_agent import forward, train_numpy

RECIPES = Path(__file__).parents[2] / "recipes"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load("control_3_numpy")


@pytest.fixture(scope="module")
def variations() -> ModuleType:
    return load("control_3_variations")


def run_of(recipe: ModuleType, returns: list[float] | np.ndarray, greedy: float = 500.0):
    return recipe.Run(np.array(returns, dtype=float), np.full(100, greedy), 1.0)


def test_rolling_means_are_of_a_hundred_episodes(recipe, variations):
    returns = np.arange(250.0)
    for module in (recipe, variations):
        assert module.rolling(returns) == pytest.approx(np.arange(151) + 49.5)
        assert module.rolling(returns[:3]).tolist() == [1]


def test_475_is_reached_where_the_first_rolling_mean_is(recipe, variations):
    """After 200 episodes of 10, 95 of 500 and 5 of 10 have a mean of 475.5, 94 and 6 one of 470.6."""
    returns = np.r_[np.full(200, 10.0), np.full(150, 500.0)]
    assert recipe.reached(run_of(recipe, returns)) == (295, 2000 + 95 * 500)
    assert variations.reached(returns) == 295
    assert recipe.reached(run_of(recipe, returns[:294])) == (np.inf, np.inf)
    assert variations.reached(returns[:294]) == np.inf
    assert variations.reached(np.full(100, 475.0)) == 100  # the first there is


def test_curves_are_by_episodes_and_by_steps(recipe):
    one = run_of(recipe, np.r_[np.full(100, 10.0), np.full(400, 20.0)])
    episodes, mean = recipe.curve(one, "episodes")
    steps, again = recipe.curve(one, "environment steps")
    assert episodes.tolist() == list(range(100, 501))
    assert steps == pytest.approx(1000 + 20 * np.arange(401))
    assert mean == pytest.approx(np.minimum(10 + np.arange(401) / 10, 20))
    assert again.tolist() == mean.tolist()
    for axis, at in (("episodes", 3), ("environment steps", 9)):  # fewer than a hundred: one mean of all
        assert [x.tolist() for x in recipe.curve(run_of(recipe, [1, 2, 6]), axis)] == [[at], [3]]


def test_curves_are_interpolated_where_every_seed_has_one(recipe):
    """Three runs of 300, 130 and 500 episodes, of 20, 20, and first 10 and then 20 steps."""
    late = np.r_[np.full(100, 10.0), np.full(400, 20.0)]
    runs = [run_of(recipe, returns) for returns in (np.full(300, 20.0), np.full(130, 20.0), late)]
    x, means = recipe.together([recipe.curve(one, "episodes") for one in runs])
    assert (x[0], x[-1]) == pytest.approx((100, 130))
    assert means[:2] == pytest.approx(np.full((2, len(x)), 20))
    assert means[2] == pytest.approx(10 + (x - 100) / 10)
    x, means = recipe.together([recipe.curve(one, "environment steps") for one in runs], points=5)
    assert (x[0], x[-1]) == pytest.approx((2000, 2600))
    assert means[:2] == pytest.approx(np.full((2, 5), 20))
    assert means[2] == pytest.approx(10 + (x - 1000) / 200)  # 20 steps later the mean is higher by 0.1
    assert not np.isclose(x[1:-1] % 20, 0).any()  # the grid's points lie between the ends of episodes


def test_bands_are_of_the_mean_over_seeds(recipe, variations):
    x = np.random.default_rng(1).normal(2, 1, size=(400, 2))
    for module in (recipe, variations):
        mean, low, high = module.interval(x)
        assert mean == pytest.approx(x.mean(0))
        assert (high - low) / 2 == pytest.approx(1.96 * x.std(0) / 20, rel=0.15)
        assert module.interval(np.array([7.0])).tolist() == [7, 7, 7]


def test_gains_are_between_runs_of_the_same_seed(variations):
    generator = np.random.default_rng(2)
    usual = {seed: generator.normal(100 * seed, 1, size=600) for seed in range(4)}  # seeds differ widely
    better = {seed: usual[seed] + np.r_[np.zeros(100), np.full(500, 3.0)] for seed in (3, 1, 0)}
    assert variations.gains(better, usual, 500) == pytest.approx([3, 3, 3])
    assert variations.gains(better, usual, 0) == pytest.approx([2.5, 2.5, 2.5])  # 0 is all episodes
    assert variations.gains({7: usual[0]}, usual, 500).size == 0
    worse = {seed: returns - 1 for seed, returns in usual.items()}
    mixed = {seed: returns + (5 if seed else -1) for seed, returns in usual.items()}
    few = {seed: returns + 9 for seed, returns in usual.items() if seed < 2}
    panel = {"usual": usual, "better": better, "worse": worse, "mixed": mixed, "few": few}
    assert (
        variations.finding(panel, usual)
        == "in every seed above black: better; in every seed below black: worse"
    )
    assert variations.finding({"usual": usual, "few": few}, usual).startswith("in no setting")


def test_intervals_are_said_of_three_seeds_or_more(variations):
    assert variations.say(np.array([])) == "unknown"
    assert variations.say(np.array([3.0, 5.0]), "+") == "+4"
    assert variations.say(np.array([3.0, 3.0, 3.0]), "+") == "+3 [+3, +3]"


def test_evaluation_counts_each_environment_to_its_first_end(recipe):
    """Pushed one way the pole falls within 11 steps; half of the environments go on for longer."""
    seen = []

    def act(observations: np.ndarray) -> np.ndarray:
        seen.append(observations.copy())
        upright = observations[:, 2] + observations[:, 3] > 0
        return np.where(np.arange(100) < 50, 1, upright).astype(int)

    returns = recipe.evaluate(act, seed=3)
    assert returns.shape == (100,)
    assert 8 <= returns[:50].min() <= returns[:50].max() <= 11
    assert returns[50:].min() > 100
    assert len(seen) == returns.max()
    starts, first = seen[0], len(seen)
    assert recipe.evaluate(act, seed=3).tolist() == returns.tolist()
    assert (seen[first] == starts).all() and len(np.unique(starts, axis=0)) == 100
    recipe.evaluate(act, seed=4)
    assert not (seen[2 * first] == starts).any()


def test_reinforce_evaluates_the_weights_it_trained(recipe):
    returns, act = recipe.reinforce(0, 12)
    assert len(returns) == 12
    *_, (weights, _) = islice(train_numpy(recipe.NumpySettings(seed=0)), 3)
    observations = np.random.default_rng(0).normal(size=(50, 4))
    chances = forward(weights, observations)[1]
    assert act(observations).tolist() == (chances > 0.5).astype(int).tolist()
    assert 0 < act(observations).mean() < 1


@pytest.mark.slow
def test_both_agents_are_drawn_and_kept(recipe, tmp_path, monkeypatch, capsys, handlers):
    """DQN is played by a stand-in here, since stable-baselines3 is optional; its curve has another length."""
    asked = []

    def stand_in(seed: int, steps: int):
        asked.append((seed, steps))
        return [25.0 + seed] * (steps // 25), lambda seen: (seen[:, 2] + seen[:, 3] > 0).astype(int)

    monkeypatch.setattr(recipe, "dqn", stand_in)
    monkeypatch.setattr(recipe, "find_spec", lambda name: name)
    monkeypatch.chdir(tmp_path)
    arguments = recipe.Args(seeds=(0, 1), episodes=120, dqn=True, dqn_steps=5000)
    recipe.main(arguments)
    out = capsys.readouterr().out
    assert asked == [(0, 5000), (1, 5000)]
    assert "REINFORCE, 2 seeds: a mean of 475 in 0 of 2 seeds, median never" in out
    assert re.search(r"DQN, 2 seeds: .*\n.*\n  last 100 training episodes 26 \[25, 26\]", out)
    kept = sorted(path.name for path in arguments.output_dir.iterdir())
    assert kept == [f"{kind}_seed_{seed}.json" for kind in ("DQN", "REINFORCE") for seed in (0, 1)]
    assert json.loads((arguments.output_dir / "DQN_seed_1.json").read_text())["returns"] == [26.0] * 200
    first = arguments.output.read_bytes()
    monkeypatch.setattr(recipe, "reinforce", None)  # so that training would fail
    arguments.resume = True
    recipe.main(arguments)
    assert capsys.readouterr().out == out
    assert arguments.output.read_bytes() == first
    assert len(asked) == 2
    arguments.dqn_steps = 6000  # other settings: the kept runs of DQN are not these
    recipe.main(arguments)
    assert asked[2:] == [(0, 6000), (1, 6000)]


def test_dqn_without_its_package_is_refused_at_once(recipe, tmp_path, monkeypatch, handlers):
    monkeypatch.setattr(recipe, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install stable-baselines3"):
        recipe.main(recipe.Args(dqn=True, output_dir=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_dqn_trains_for_its_steps(recipe):
    pytest.importorskip("stable_baselines3")
    returns, act = recipe.dqn(0, 1500)
    assert 1300 < sum(returns) <= 1500 + recipe.DQN["train_freq"]
    assert set(act(np.random.default_rng(0).normal(size=(50, 4)))) <= {0, 1}


@pytest.mark.parametrize("name", ["recipe", "variations"])
def test_stopped_before_the_first_run_there_is_no_figure(
    name, tmp_path, monkeypatch, capsys, request, handlers
):
    module = request.getfixturevalue(name)
    monkeypatch.setattr(module, "run", lambda *_: signal.raise_signal(signal.SIGINT))
    arguments = module.Args(output=tmp_path / "figure.png", output_dir=tmp_path / "runs")
    with pytest.raises(SystemExit) as end:
        module.main(arguments)
    assert end.value.code == 130
    assert "stopped: 0 of " in capsys.readouterr().out
    assert not arguments.output.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "after"),
    [
        ("control_3_numpy", signal.SIGINT, "REINFORCE, seed 0: "),
        ("control_3_numpy", signal.SIGTERM, "REINFORCE, seed 2: "),
        ("control_3_variations", signal.SIGINT, "usual, seed 0: "),
        ("control_3_variations", signal.SIGINT, "gamma 0.95, seed 3: "),  # the others have three seeds
    ],
)
def test_a_signal_keeps_what_was_finished(name, number, after, tmp_path):
    flags = ["--seeds", *map(str, range(400)), "--episodes", "60"]
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / f"{name}.py"), *flags],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(after):
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (128 + number, "")
    told = len(lines) + sum(bool(re.match(r"\w.*, seed \d+: ", line)) for line in rest.splitlines())
    done, total = map(int, re.search(r"stopped: (\d+) of (\d+) runs are finished", rest).groups())
    files = list((tmp_path / "runs" / name).iterdir())
    assert told <= done <= len(files) <= told + 1  # the last one may have been written, and not yet told
    assert done < total == 400 * (11 if "variations" in name else 1)
    assert all(len(json.loads(path.read_text())["returns"]) == 60 for path in files)
    figures = list(tmp_path.glob("*.png"))
    assert len(figures) == 1 and f"figure: {figures[0].name}" in rest
    assert figures[0].stat().st_size > 10_000
