"""Every recipe of the control ladder runs, shortened, as a program in a folder of its own."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import zscore

RECIPES = Path(__file__).parents[2] / "recipes" / "control"


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """Return a function that runs a recipe with some flags and returns what it prints."""

    def run(name: str, flags: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_bandit(printed, tmp_path):
    """Every number of the worked example, and the order of the variances over the horizon."""
    out = printed("1_bandit", "--samples 20 --horizons 1 2 4 --episodes 200")
    for number in ("0.2689", "0.7311", "-0.2689", "0.4332", "0.6225", "0.2500", "0.0625", "0.250"):
        assert re.search(rf"(?<![\d.-]){re.escape(number)}\b", out), number
    rows = [line.split() for line in out.splitlines() if re.match(r" +4 ", line)]
    exact = {(returns, baseline): float(variance) for _, returns, baseline, variance, *_ in rows}
    assert exact["reward_to_go", "timestep_mean"] < exact["total", "timestep_mean"]
    assert exact["total", "timestep_mean"] < exact["reward_to_go", "none"] < exact["total", "none"]
    for figure in ("bandit.png", "variance_horizon.png"):
        assert (tmp_path / figure).stat().st_size > 1000


@pytest.mark.slow
def test_gridworld(printed, tmp_path):
    out = printed("2_gridworld", "--seeds 1 --updates 3 --stages 0 --gradients 20")
    assert "vanilla" in out and "after   0 updates" in out
    assert (tmp_path / "gridworld.png").stat().st_size > 1000


@pytest.mark.slow
def test_entropy(printed, tmp_path):
    out = printed("entropy", "--seeds 2 --updates 2 --betas 0 1")
    assert out.count("sweet spot: ") == 2
    assert len(re.findall(r"^ +[01] .*goal \d, decoy \d, neither \d$", out, re.MULTILINE)) == 4
    assert (tmp_path / "entropy.png").stat().st_size > 1000


@pytest.mark.slow
def test_numpy_alone_and_varied(printed, tmp_path):
    varied = printed(
        "3_numpy", "--seeds 0 1 --episodes 100 --vary window=5 gamma=1,standardise=False"
    )
    assert "REINFORCE, 2 seeds: a mean of 475 in 0 of 2 seeds, median never" in varied
    assert varied.count("475 in 0 of 2 seeds") == 3 and "gamma=1,standardise=False, 2" in varied
    assert (tmp_path / "numpy_cartpole.png").stat().st_size > 10_000


@pytest.mark.slow
def test_numpy_beside_dqn(printed):
    pytest.importorskip("stable_baselines3")
    out = printed("3_numpy", "--seeds 0 --episodes 100 --dqn --dqn-steps 2500")
    assert "DQN, 1 seeds: a mean of 475 in 0 of 1 seeds" in out


@pytest.mark.slow
def test_walk(printed, tmp_path):
    out = printed("4_walk", "--seeds 1 --episodes 8 --hidden 8")
    table = [line.split()[:4] for line in out.splitlines() if re.match(r" +\d ", line)]
    returns = [0.99 ** (9 - t) for t in range(10)]
    assert [float(row[2]) for row in table] == pytest.approx(returns, abs=1e-4)
    normalised = np.array([float(row[3]) for row in table])
    assert normalised == pytest.approx(zscore(returns), abs=1e-3)
    kinds = [line[:14].strip() for line in out.splitlines() if " last " in line and ";" in line]
    assert kinds == ["normalised", "normalised, V", "raw", "raw, V"]
    assert (tmp_path / "walk.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_walk_of_the_textbook():
    """Its plain loop gives the numbers that the textbook states for its seed 42."""
    textbook = runpy.run_path(str(RECIPES / "4_walk.py"))["textbook"]
    assert textbook(42, value_head=False) == pytest.approx(0.4872, abs=5e-5)
    assert textbook(42, value_head=True) == pytest.approx(1.1734, abs=5e-5)


@pytest.mark.slow
def test_agents(printed, tmp_path):
    flags = "--env CartPole-v1 Acrobot-v1 Pendulum-v1 --seeds 2 1 --max-steps 1 --eval-episodes 2"
    out = printed("5_agents", flags)
    for agent in ("classic", "tuned"):
        assert re.search(
            rf"^CartPole-v1, {agent}: .*\n  mean .*, 0 of 2 seeds reach 475$", out, re.MULTILINE
        )
        assert re.search(rf"^Pendulum-v1, {agent}: -\S+\n  mean [^,]+, [^,]+$", out, re.MULTILINE)
        run = tmp_path / f"runs/agents/CartPole-v1-{agent}-seed1"
        summary = json.loads((run / "summary.json").read_text())
        assert f"{summary['eval_after']['reward']:.1f} ± " in out
    assert (tmp_path / "agents.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("env", ["Acrobot-v1", "LunarLander-v3"])
def test_tuned_agents_reach_the_threshold(printed, env):
    if env.startswith("Lunar"):
        pytest.importorskip("Box2D")
    assert "1 of 1 seeds reach" in printed("5_agents", f"--env {env} --agent tuned --seeds 1")


@pytest.mark.slow
def test_contrast(printed, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    out = printed("contrast", "--seeds 1 --updates 3 --episodes 4 --steps 2 --prompts 2 --bins 2")
    AcceleratorState._reset_state(True)
    assert "CartPole-v1" in out and "sort_digits" in out
    assert (tmp_path / "contrast.png").stat().st_size > 1000
