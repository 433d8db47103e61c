"""The RLHF recipes, shortened, and the arithmetic of over-optimisation."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from toy_tasks import sentiment

RECIPES = Path(__file__).parent.parent / "recipes" / "language"
SHORT = {"pairs": 24, "max_steps": 2, "prompts_per_step": 2, "eval_prompts": 3, "pool": 16}


@pytest.fixture(scope="module")
def study():
    return runpy.run_path(str(RECIPES / "overoptimisation.py"))


@pytest.fixture(scope="module")
def pipeline():
    return runpy.run_path(str(RECIPES / "rlhf_pipeline.py"))


@pytest.mark.slow
def test_the_pipeline_compares_rl_with_best_of_n(pipeline, short_warm_start, tmp_path, capsys):
    pipeline["main"](pipeline["Args"](output_dir=tmp_path / "run", **SHORT))
    output = capsys.readouterr().out
    policies = {f"{who}, {mode}" for who in ("base", "RL") for mode in ("sampled", "greedy")}
    for name in policies | {"best of 1", "best of 4", "best of 16"}:
        assert re.search(rf"^{name} .* ± ", output, re.MULTILINE), name
    assert re.search(r"^RL ends at gold .* base, .* best of 16$", output, re.MULTILINE)
    lines = (tmp_path / "run" / "policy" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3  # before, and two steps
    last = json.loads(lines[-1])
    assert {"rewards/gold/mean", "kl"} <= set(last)
    assert last["reward"] == pytest.approx(last["rewards/proxy/mean"])
    assert (tmp_path / "run" / "rlhf_pipeline.png").stat().st_size > 20_000


def test_the_gold_reward_of_the_study_is_highest_at_two_points_and_ignores_more_than_its_floor(
    study,
):
    words = [*sentiment.GOOD_ADJECTIVES[:6]]
    texts = ["".join(words[:n]) + "." for n in range(7)]
    assert study["gold"](texts) == [0, 1, 2, 0, -2, -4, -4]
    assert study["gold"]([" awful dull."]) == [-2]


def test_a_turn_is_found_where_gold_falls_and_the_proxy_rises_and_only_there(study):
    rng = np.random.default_rng(0)
    d = np.linspace(0.2, 4, 20) + 0.01 * rng.normal(size=(5, 20))
    noise = 0.02 * rng.normal(size=(5, 20))
    turning = study["turn"](d, d, d * (2 - d / 2) + noise)
    assert turning["fell"] == 5
    assert turning["d"][0] == pytest.approx(2, abs=0.25)
    assert turning["gold"][0] == pytest.approx(-2, abs=0.1)
    assert turning["proxy"][0] == pytest.approx(2, abs=0.3)
    # gold does not fall; the proxy does
    assert study["turn"](d, d, d + noise)["fell"] == 0
    assert study["turn"](d, noise - d, d * (2 - d / 2))["fell"] == 0


@pytest.mark.slow
def test_the_study_runs_and_leaves_its_numbers_and_figure(
    study, short_warm_start, tmp_path, capsys, monkeypatch
):
    for name, small in {"SAMPLED_PAIRS": 40, "PAIRS": 20, "JUDGE_WIDTH": 16}.items():
        monkeypatch.setitem(study["train_judge"].__globals__, name, small)
    study["main"](study["Args"](output_dir=tmp_path / "runs", seeds=2, max_steps=5, pool=16))
    output = capsys.readouterr().out
    assert "best-of-n" in output and "seed 1: accuracy" in output
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    best = results["best-of-n"]["curves"]
    assert np.shape(best["gold"]) == (2, 4) and best["d"][0][0] == 0.01
    assert (np.diff(best["proxy"], axis=1) >= 0).all()  # it is the proxy that chooses
    assert np.shape(results["RL"]["curves"]["d"]) == (2, 1)
    assert (tmp_path / "runs" / "overoptimisation.png").stat().st_size > 20_000
