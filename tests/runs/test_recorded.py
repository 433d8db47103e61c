"""Reports and diagnoses of runs whose files somebody has edited or a disk has damaged."""

from __future__ import annotations

import json
import shutil

import pytest

from tokenrl.cli import main
from tokenrl.control import train_agent

QUICK = ["x", [1], {"a": [1]}, 10**400]
ODD = [*QUICK, *(pytest.param(odd, marks=pytest.mark.slow) for odd in (5, -1, "", None, True, [], ["a"], {}))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "finished"
    train_agent(env="bandit", max_steps=2, num_envs=4, eval_episodes=2, output_dir=path, quiet=True)
    return path


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def told(run, capsys, other=None) -> list[str]:
    """The refusals of every command that reads a run; each that is no refusal has to be a success."""
    capsys.readouterr()
    output = str(run.parent / "page.html")
    commands = [["report", str(run)], ["advise", "--run", str(run)]]
    commands += [["report", str(run), str(other), "--output", output]] if other else []
    said = []
    for command in commands:
        code, error = main(command), capsys.readouterr().err
        assert code in (0, 2) and error.count("\n") == (code == 2), (command, code, error)
        said += [error] if code else []
    return said


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: str(odd)[:12])
@pytest.mark.parametrize("name", ["exit_reason", "flags", "steps", "wall_seconds", "eval_after", "verdict"])
def test_a_summary_of_odd_types_is_shown_or_refused(name, odd, run, capsys):
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: odd}))
    for error in told(run, capsys):
        assert str(path) in error and name in error


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("command", 5),
        ("command", {"a": 1}),
        ("title", []),
        ("kind", ["train"]),
        ("kind", 5),
        ("solved", "high"),
        ("solved", [1]),
        ("versions", 3),
        ("max_steps", None),
        ("max_steps", "2"),
        ("estimator", 5),
    ],
)
def test_a_configuration_of_odd_types_is_shown_or_refused(name, odd, run, finished, capsys):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: odd}))
    found = told(run, capsys, finished)
    assert found and all(name in error or "unknown command" in error or "kinds" in error for error in found)


@pytest.mark.parametrize("odd", [*ODD, "Infinity"], ids=lambda odd: str(odd)[:12])
@pytest.mark.parametrize("name", ["step", "reward", "reward_std", "grad_norm", "eval_reward_stderr", "new"])
def test_metrics_of_odd_types_are_shown_or_refused(name, odd, run, capsys):
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1][name] = odd
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told(run, capsys)


@pytest.mark.slow
def test_every_file_cut_short_is_shown_or_refused(run, finished, capsys):
    for name in ("summary.json", "config.json", "metrics.jsonl"):
        whole = (run / name).read_bytes()
        for length in range(0, len(whole), max(1, len(whole) // 2)):
            (run / name).write_bytes(whole[:length] + b"\xff" * (length % 2))
            told(run, capsys)
        (run / name).write_bytes(whole)
    assert not told(run, capsys, finished)


@pytest.mark.slow
def test_completions_cut_short_or_of_odd_types_are_refused_with_their_file(run, capsys):
    import pyarrow
    import pyarrow.parquet as parquet

    path = run / "completions" / "step_000001.parquet"
    path.parent.mkdir()
    odd = {"prompt": [{"a": 1}], "when": [pyarrow.scalar(0, pyarrow.timestamp("s")).as_py()], "raw": [b"x"]}
    for table in ({"prompt": ["a"], "reward": [1.5]}, odd):
        parquet.write_table(pyarrow.table(table), path)
        said = told(run, capsys)
        assert not said
    whole = path.read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert any(str(path) in error for error in told(run, capsys))
