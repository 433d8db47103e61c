"""Comparisons from the command to the report: repeated, killed, printed, extended; and what they find."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import tokenrl
from tokenrl.errors import Refused

WALK = {
    "env": "walk",
    "arms": ("reinforce", "reinforce_timestep_mean"),
    "seeds": 2,
    "max_steps": 3,
    "num_envs": 4,
    "eval_episodes": 4,
    "quiet": True,
    "workers": 1,  # which imports torch once; tests/lab/compare/test_compare_workers.py has two
}


def found_in(folder):
    """What the seeds determine: everything but times."""
    found = json.loads((folder / "comparison.json").read_text())
    found.pop("timings")
    return found, (folder / "comparisons.csv").read_bytes(), (folder / "runs.csv").read_bytes()


def metrics(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("metrics.jsonl"))}


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "walk"
    return tokenrl.compare(**WALK, output_dir=str(folder)), folder


def test_a_comparison_leaves_plan_runs_tables_and_report(walk):
    found, folder = walk
    assert found.exit_code == 0
    assert {"plan.json", "runs.csv", "comparisons.csv", "comparison.json", "report.html"} <= set(
        os.listdir(folder)
    )
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert len(rows) == 6 and {row["state"] for row in rows} == {"finished"}
    assert {(row["arm"], row["role"]) for row in rows} == {
        ("reinforce", "comparison"),
        ("reinforce", "itself"),
        ("reinforce_timestep_mean", "comparison"),
    }
    for row in rows:
        run = folder / row["path"]
        evaluations = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rewards = [e["eval_reward"] for e in evaluations if "eval_reward" in e]
        assert float(row["area"]) == pytest.approx(sum(rewards[1:]) / len(rewards[1:]))
        assert float(row["reward"]) == rewards[-1] and float(row["samples"]) == 3 * 4
    (difference,) = found.judgement.families[0].differences
    by_seed = {(r["arm"], r["role"], int(r["seed"])): float(r["area"]) for r in rows}
    assert difference.differences == {
        seed: pytest.approx(
            by_seed["reinforce_timestep_mean", "comparison", seed] - by_seed["reinforce", "comparison", seed]
        )
        for seed in (0, 1)
    }
    assert difference.verdict == "descriptive", "two pairs give no verdict"


def test_arms_start_from_the_same_policy_and_are_evaluated_alike(walk):
    _, folder = walk
    first = {}
    for path in folder.rglob("metrics.jsonl"):
        seed = path.parent.name
        first.setdefault(seed, set()).add(path.read_text().splitlines()[0])
    assert all(len(lines) == 1 for seed, lines in first.items()), "before training all arms are the same"
    assert len(set().union(*first.values())) > 1, "and seeds differ"


def test_repeated_it_runs_nothing_and_finds_the_same(walk):
    _, folder = walk
    before, times = found_in(folder), {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.jsonl")}
    tokenrl.compare(**WALK, output_dir=str(folder))
    assert found_in(folder) == before
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.jsonl")} == times


def test_another_experiment_in_the_same_directory_is_refused(walk):
    _, folder = walk
    with pytest.raises(Refused, match="another comparison"):
        tokenrl.compare(**{**WALK, "max_steps": 5}, output_dir=str(folder))


@pytest.mark.slow
def test_printed_commands_make_the_same_runs(walk, tmp_path, capsys):
    _, folder = walk
    options = {**WALK, "output_dir": str(tmp_path / "walk")}
    tokenrl.compare(**options, print_commands=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokenrl control" in line]
    assert len(lines) == 6 and len(set(lines)) == 6
    line = lines[0].replace("tokenrl control", f"{sys.executable} -m tokenrl control")
    subprocess.run(line, shell=True, check=True, capture_output=True, timeout=120)
    (made,) = metrics(tmp_path / "walk").items()
    assert metrics(folder)[made[0]] == made[1]
    tokenrl.compare(**options, print_commands=True)
    assert len([x for x in capsys.readouterr().out.splitlines() if "tokenrl control" in x]) == 5


@pytest.mark.slow
def test_killed_half_way_and_started_again_it_finds_the_same_bit_for_bit(tmp_path):
    flags = "--env walk --arms reinforce reinforce_timestep_mean --seeds 6 --max-steps 40 --num-envs 8 "
    for name in ("whole", "killed"):
        words = [sys.executable, "-m", "tokenrl", "compare", *flags.split(), "--output-dir", name]
        if name == "killed":
            for number in (signal.SIGKILL, signal.SIGTERM):
                process = subprocess.Popen(
                    words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
                wanted = 3 if number == signal.SIGKILL else 9
                while len(list((tmp_path / name).rglob("summary.json"))) < wanted and process.poll() is None:
                    time.sleep(0.05)
                process.send_signal(number)
                _, errors = process.communicate(timeout=120)
                assert process.returncode == (-9 if number == signal.SIGKILL else 143), errors
                assert b"Traceback" not in errors
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    whole, killed = (found_in(tmp_path / name) for name in ("whole", "killed"))
    for one in (whole[0], killed[0]):
        one["plan"].pop("command")
        one.pop("command")
    assert whole == killed
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


@pytest.mark.slow
def test_ray_finds_the_same_as_local_processes(walk, tmp_path):
    pytest.importorskip("ray")
    tokenrl.compare(**{**WALK, "workers": 2}, output_dir=str(tmp_path / "walk"), executor="ray")
    assert found_in(tmp_path / "walk") == found_in(walk[1])
    assert metrics(tmp_path / "walk") == metrics(walk[1])


@pytest.mark.slow
def test_arms_that_differ_by_a_factor_are_equivalent_under_adamw(tmp_path):
    found = tokenrl.compare(
        task="sort_digits",
        arms=("rloo", "rloo,baseline=group_mean"),
        seeds=6,
        max_steps=60,
        max_grad_norm=0,
        against_itself=False,
        noise=False,
        quiet=True,
        output_dir=str(tmp_path / "factor"),
    )
    (difference,) = found.judgement.families[0].differences
    assert difference.verdict == "equivalent", difference
    said = " ".join(found.findings["sort_digits"])
    assert "Optimiser: the gradients of rloo and rloo,baseline=group_mean differ only by a constant" in said


@pytest.mark.slow
def test_no_baseline_is_worse_where_rewards_are_shifted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shifted.py").write_text(
        "import toy_tasks\n"
        "task = toy_tasks.load('sort_digits')\n"
        "def reward(prompts, completions, **columns):\n"
        "    return [1 + r for r in task.reward(prompts, completions, **columns)]\n"
        "reward.range = (1.0, 2.0)\n"
    )
    found = tokenrl.compare(
        task="sort_digits",
        reward="shifted.py:reward",
        arms=("rloo", "reinforce"),
        seeds=6,
        max_steps=100,
        against_itself=False,
        noise=False,
        quiet=True,
        output_dir="shifted",
    )
    assert found.judgement.verdicts() == {("sort_digits", "reinforce"): "worse"}
    assert found.plan.margins == {"sort_digits": pytest.approx(0.02)}
