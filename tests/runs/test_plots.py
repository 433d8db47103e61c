import math
import subprocess
import sys

import pytest

from tokenrl.runs import plots
from tokenrl.runs.plots import learning_curve, series, smooth

ROWS = [{"step": 0, "eval_reward": 0.1, "eval_reward_greedy": 0.2}] + [
    {"step": step, "reward": step / 50, "entropy": 2.0 - step / 50, "kl": step / 100, "grad_norm": 1.0,
     "completions/mean_length": 12.0, "frac_reward_zero_std": 0.1}
    for step in range(1, 51)
]  # fmt: skip


def size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [{key: row[key] for key in ("step", "reward") if key in row} for row in ROWS],
        ROWS[:1],
        ROWS[:2],
        ROWS[1:2],
        [],
        [{"step": 1, "reward": math.nan, "entropy": None}, {"step": 2, "reward": "Infinity", "entropy": 0.0}],
        [{"step": step, "reward": -200.0 - step, "grad_norm": 0.0} for step in range(4)],
        [{"step": step, "reward": 1.7e308 * (-1) ** (step // 60), "kl": 1.7e308} for step in range(120)],
    ],
    ids=[
        "all",
        "reward only",
        "before training only",
        "one step",
        "one step, no evaluation",
        "none",
        "nan",
        "negative",
        "huge",
    ],
)
def test_png_of_the_stated_size_whatever_is_missing(tmp_path, rows):
    path = learning_curve(tmp_path / "a.png", rows, title=r"costs $\frac$", solved=0.9, subtitle="50 % $")
    assert size(path) == (1200, 700)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("more, panels", [({}, ["loss"]), ({"reward": 0.5}, [])])
def test_without_training_rewards_the_loss_has_a_panel_of_its_own(tmp_path, monkeypatch, more, panels):
    rows = [{"step": step, "loss": 1.0 / (step + 1), "eval_reward": 0.1, **more} for step in range(3)]
    drawn = []
    monkeypatch.setattr(plots, "_health_panel", lambda axes, points, name, *_: drawn.append(name))
    learning_curve(tmp_path / "curve.png", rows, title="t")
    assert drawn == panels


def test_same_metrics_same_picture(tmp_path):
    first, second = (
        learning_curve(tmp_path / name, ROWS, title="t", solved=None, subtitle="").read_bytes()
        for name in "ab"
    )
    assert first == second
    assert learning_curve(tmp_path / "c", ROWS, title="t", solved=0.5, subtitle="").read_bytes() != first


def test_global_state_of_pyplot_is_left_alone(tmp_path):
    code = (
        "import pathlib, sys; from tokenrl.runs.plots import learning_curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        "learning_curve(pathlib.Path(sys.argv[1]), [{'step': 0, 'reward': 1.0}], title='t')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True)


def test_series_takes_finite_numbers_with_their_steps():
    rows = [{"step": 1, "a": 1}, {"step": 2}, {"step": 3, "a": None}, {"step": 4, "a": "Infinity"},
            {"step": 5, "a": math.nan}, {"step": 6, "a": 0.5}]  # fmt: skip
    assert series(rows, "a") == ([1, 6], [1.0, 0.5])


def test_smoothing_is_centred_and_shrinks_at_the_ends():
    assert smooth([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]
    assert smooth([1, 2], 1) == [1, 2]
    assert smooth([], 3) == []
