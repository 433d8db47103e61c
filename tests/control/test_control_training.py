"""A run from the first evaluation to the last file, and everything that stops it before it begins."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
from dataclasses import replace

import pytest
import torch
from folders import RECIPES, read_json
from refusals import refused

from tokenrl.control import training
from tokenrl.control.environments import describe
from tokenrl.control.training import train_agent as train
from tokenrl.runs.threads import using_threads

SHORT = {"max_steps": 2, "num_envs": 4, "eval_episodes": 5, "quiet": True}
OFTEN = {"estimator": "a2c", "normalize_observations": True}


def short(tmp_path, name="run", **options):
    return train(output_dir=tmp_path / name, **(SHORT | options))


def rows(result, name="metrics"):
    return [
        json.loads(line) for line in (result.output_dir / f"{name}.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """One run with many of the options, and its output."""
    options = {"save_every": 1, "learning_rate_schedule": "linear", "quiet": False}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        with using_threads(2):
            result = short(tmp_path_factory.mktemp("once"), learning_rate=0.4, **OFTEN, **options)
            assert torch.get_num_threads() == 2
    return result, out.getvalue()


def test_a_run_leaves_a_complete_directory(once):
    """The reward of CartPole is 1 per step, so the mean return times the episodes is the number of steps."""
    result, output = once
    folder, lines = result.output_dir, rows(result)
    assert (result.exit_reason, result.exit_code, result.steps) == ("finished", 0, 2)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {"entropy", "grad_norm", "eval_reward", "eval_reward_greedy"} <= set(lines[1])
    steps = [line["reward"] * line["episodes"] for line in lines[1:]]
    assert [line["num_env_steps"] for line in lines[1:]] == [steps[0], sum(steps)]
    assert all(line["reward"] == line["episode_length"] for line in lines[1:])
    assert [line["learning_rate"] for line in lines[1:]] == pytest.approx([0.4, 0.2])
    summary = read_json(folder / "summary.json")
    assert summary["env_steps"] == lines[-1]["num_env_steps"] == result.env_steps
    # by the clock, as in the progress, and not by the processor's time
    rates = summary["env_steps_per_second"], rows(result, "timings")[-1]["env_steps_per_second"]
    assert rates == pytest.approx([result.env_steps / result.train_seconds] * 2)
    assert "threads 1 (fewer than 10 M parameters)" in " ".join(output.split())
    assert (summary["solved"], summary["threshold"]) == (False, 475)
    assert output.splitlines()[-1] == summary["verdict"] != ""
    assert summary["verdict"] in (folder / "report.html").read_text()


def test_a_saved_policy_acts_as_it_did_and_a_second_run_needs_overwrite(once, tmp_path):
    result, _ = once
    options = {**OFTEN, "load": str(result.output_dir), "max_steps": 0}
    again = short(tmp_path, **options, initial_weights="uniform")
    assert again.steps == 0 and again.eval_before == again.eval_after
    assert again.eval_after["reward_greedy"] == result.eval_after["reward_greedy"]
    with refused("already holds a run"):
        short(tmp_path, **options)
    assert short(tmp_path, **options, overwrite=True).eval_after == again.eval_after
    with refused("hidden"):
        short(tmp_path, "another", **options, hidden=(8,))


def test_a_run_depends_on_its_seed_and_not_on_evaluations_in_between(tmp_path):
    entropies = []
    for options in ({"eval_every": 1}, {"eval_every": 0}, {"eval_every": 0, "seed": 1}):
        result = short(tmp_path, str(options), estimator="a2c", **options)
        entropies.append([line["entropy"] for line in rows(result)[1:]])
    assert entropies[0] == entropies[1] and entropies[1][0] != entropies[2][0]


def test_every_update_has_starting_states_of_its_own(tmp_path, monkeypatch):
    learn, starts = training.learn, []

    def noted(agent, rollout, step):
        starts.append(rollout.observations[:, 0])
        return learn(agent, rollout, step)

    monkeypatch.setattr(training, "learn", noted)
    short(tmp_path)
    assert len(torch.cat(starts).unique(dim=0)) == 2 * 4


def test_a_bandit_stops_once_it_is_solved_and_else_its_entropy_collapses(tmp_path, monkeypatch):
    """Its rewards are 1 and 0; a mean of .8 is reached on the way."""
    spec = replace(describe("bandit"), solved=0.8)
    monkeypatch.setattr(training, "describe", lambda env, _: spec)
    options = {"env": "bandit", "hidden": (), "num_envs": 32, "max_steps": 40, "learning_rate": 0.3}
    options |= {"eval_every": 3, "eval_episodes": 40}
    full = short(tmp_path, **options)
    assert (full.steps, full.solved, full.flags) == (40, True, ["entropy-collapsed"])
    assert full.eval_before["reward_greedy_stderr"] == 0 < full.eval_before["reward_stderr"]
    options["stop_when_solved"] = True
    stopped = short(tmp_path, "stopped", **options)
    assert stopped.exit_reason == "solved" and 0 < stopped.steps < 40
    spec = replace(spec, solved=0.1)
    at_once = short(tmp_path, "at once", **options)
    assert (at_once.exit_reason, at_once.steps, at_once.solved) == ("solved", 0, True)


def test_the_recipe_films_an_episode_of_a_run(once, said):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    pytest.importorskip("pygame")
    result, _ = once
    runpy.run_path(str(RECIPES / "control" / "film.py"))["main"](result.output_dir)
    film = result.output_dir / "videos" / "episode-episode-0.mp4"
    printed = said()
    assert str(film) in printed
    count, _ = imageio_ffmpeg.count_frames_and_secs(str(film))
    steps = float(re.search(r"return (\S+),", printed)[1])  # of CartPole
    assert count == steps + 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_cartpole_is_solved_on_every_seed(tmp_path, seed):
    settings = {"max_steps": 60, "eval_every": 0, "quiet": True}
    result = train(seed=seed, output_dir=tmp_path, **settings)
    assert min(result.eval_after["reward"], result.eval_after["reward_greedy"]) >= 475
