"""The RLHF recipes, shortened: stages that are skipped or redone, and the arithmetic of over-optimisation."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from toy_tasks import sentiment

RECIPES = Path(__file__).parent.parent / "recipes" / "language"
STAGES = ["base", "preferences", "reward_model", "policy", "evaluation"]
SHORT = {"pairs": 24, "max_steps": 2, "prompts_per_step": 2, "eval_prompts": 3, "pool": 16}


@pytest.fixture(scope="module")
def study():
    return runpy.run_path(str(RECIPES / "overoptimisation.py"))


@pytest.fixture(scope="module")
def pipeline():
    return runpy.run_path(str(RECIPES / "rlhf_pipeline.py"))


@pytest.mark.slow
def test_the_pipeline_skips_what_is_done_and_redoes_what_depends_on_a_change(
    pipeline, short_warm_start, tmp_path, capsys
):
    def run(**changes):
        pipeline["main"](pipeline["Args"](output_dir=tmp_path / "run", **SHORT | changes))
        output = capsys.readouterr().out
        return [name for name in STAGES if f"{name}: skipped" in output], output

    skipped, first = run()
    assert skipped == []
    skipped, second = run()
    assert skipped == STAGES
    assert second.split("\n\n")[1] == first.split("\n\n")[1]  # the table and the verdict
    skipped, _ = run(max_steps=3)
    assert skipped == STAGES[:3]
    lines = (tmp_path / "run" / "policy" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4  # before, and three steps
    assert {"rewards/gold/mean", "rewards/proxy/mean", "kl", "reward"} <= set(json.loads(lines[-1]))
    assert json.loads(lines[-1])["reward"] == pytest.approx(
        json.loads(lines[-1])["rewards/proxy/mean"]
    )
    assert (tmp_path / "run" / "rlhf_pipeline.png").stat().st_size > 20_000
    rows = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["rows"]
    by_name = {row["name"]: row for row in rows}
    policies = {f"{who}, {mode}" for who in ("base", "RL") for mode in ("sampled", "greedy")}
    assert set(by_name) == policies | {"best of 1", "best of 4", "best of 16"}
    assert by_name["base, sampled"]["kl"][0] == pytest.approx(0, abs=1e-5)
    assert 0 < by_name["best of 4"]["kl"][0] <= by_name["best of 4"]["bound"]


def test_a_stage_that_was_stopped_is_done_again(pipeline, tmp_path):
    args, done = pipeline["Args"](output_dir=tmp_path), []

    def stopped(folder):
        raise KeyboardInterrupt

    pipeline["stage"](args, "base", {"task": "a"}, done.append)
    with pytest.raises(KeyboardInterrupt):
        pipeline["stage"](args, "base", {"task": "b"}, stopped)
    pipeline["stage"](args, "base", {"task": "a"}, done.append)
    pipeline["stage"](args, "base", {"task": "a"}, done.append)
    assert len(done) == 2


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
    turning = study["findings"](study["Curve"]("RL", d, d, d * (2 - d / 2) + noise))
    assert turning["turned"] and turning["fell"] == 5
    assert turning["d"][0] == pytest.approx(2, abs=0.25)
    assert turning["gold"][0] == pytest.approx(-2, abs=0.1)
    assert turning["proxy"][0] == pytest.approx(2, abs=0.3)
    # gold does not fall; the proxy does
    for proxy, gold in (
        (d, d + noise),
        (noise - d, d * (2 - d / 2)),
    ):
        findings = study["findings"](study["Curve"]("RL", d, proxy, gold))
        assert not findings["turned"] and findings["fell"] == 0
    gold = np.concatenate([d[:2], d[2:] * (2 - d[2:] / 2)])  # three of five fall
    findings = study["findings"](study["Curve"]("RL", d, d, gold))
    assert findings["fell"] == 3 and not findings["turned"]


@pytest.mark.slow
def test_the_study_runs_and_leaves_its_numbers_and_figure(
    study, short_warm_start, tmp_path, capsys
):
    small = {"configurations": ("16:20",), "seeds": 2, "max_steps": 5, "pool": 16}
    study["main"](study["Args"](output_dir=tmp_path / "runs", **small))
    output = capsys.readouterr().out
    assert "min on one core" in output.splitlines()[0] and "16:20 best-of-n" in output
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert set(results) == {"16:20 RL", "16:20 best-of-n"}
    best = results["16:20 best-of-n"]["curves"]
    assert np.shape(best["gold"]) == (2, 4) and best["d"][0][0] == 0.01
    assert (np.diff(best["proxy"], axis=1) >= 0).all()  # it is the proxy that chooses
    assert np.shape(results["16:20 RL"]["curves"]["d"]) == (2, 1)
    assert (tmp_path / "runs" / "overoptimisation.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("selection", "expected"),
    [("RL", 2 * (1.5 - 0.8 * math.log(2))), ("best-of-n", 2 * (1.5 - 0.8 * 2))],
)
def test_a_fit_recovers_its_own_form(study, selection, expected):
    d = np.linspace(0.1, 5, 4000)
    assert study["columns"](np.array([2.0]), selection)[0] @ [1.5, 0.8] == pytest.approx(
        expected, abs=1e-12
    )
    gain = study["columns"](d, selection) @ [1.5, 0.8]
    coefficients = study["fit_gain"](d.reshape(2, -1), gain.reshape(2, -1), selection)
    assert coefficients == pytest.approx((1.5, 0.8), rel=1e-9)
