"""A run from the first evaluation to the last file, and everything that stops it before it begins."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv

from tokenrl.control.environments import describe
from tokenrl.control.saving import read_policy
from tokenrl.control.training import train_agent as train
from tokenrl.core import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.runs.threads import using_threads

FILMED = {"num_envs": 2, "max_steps": 1, "eval_episodes": 2, "quiet": True, "video": True}
SHORT = {"max_steps": 2, "num_envs": 4, "eval_episodes": 5, "quiet": True}


def short(tmp_path, name="run", **options):
    return train(output_dir=str(tmp_path / name), **(SHORT | options))


def metrics_of(result):
    return [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.drawn
def test_a_run_leaves_a_complete_directory(tmp_path):
    result = short(tmp_path, save_every=1, diagnostics_every=1)
    assert (result.exit_reason, result.exit_code, result.steps) == ("finished", 0, 2)
    lines = metrics_of(result)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {"reward", "entropy", "grad_norm", "episode_length", "gradient/snr"} <= set(lines[1])
    assert all(math.isfinite(line["reward"]) for line in lines[1:])
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert summary["eval_after"]["reward"] == pytest.approx(result.eval_after["reward"])
    assert {"exit_reason", "wall_seconds", "env_steps_per_second", "flags", "solved"} <= set(summary)
    assert summary["env_steps"] == lines[-1]["num_env_steps"] == result.env_steps
    assert json.loads((result.output_dir / "config.json").read_text())["env"] == "CartPole-v1"
    assert "CartPole-v1" in (result.output_dir / "report.html").read_text()
    assert (result.output_dir / "learning_curve.png").stat().st_size > 1000
    checkpoints = sorted(path.name for path in (result.output_dir / "checkpoints").iterdir())
    assert checkpoints == ["step_000001", "step_000002"]


def test_steps_and_returns_are_counted_right(tmp_path):
    """CartPole pays one point a step: the mean return times the episodes is the number of steps."""
    lines = metrics_of(short(tmp_path))
    steps = [line["reward"] * line["episodes"] for line in lines[1:]]
    assert [line["num_env_steps"] for line in lines[1:]] == [steps[0], sum(steps)]
    assert all(line["reward"] == line["episode_length"] for line in lines[1:])


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    runs = [metrics_of(short(tmp_path, str(i), seed=s, estimator="a2c")) for i, s in enumerate((0, 0, 1))]
    assert runs[0] == runs[1]
    assert runs[0][1]["reward"] != runs[2][1]["reward"] or runs[0][1]["entropy"] != runs[2][1]["entropy"]


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "reinforce"},
        {"estimator": "rloo"},
        {"estimator": "grpo"},
        {"estimator": "reinforce_running_mean"},
        {"estimator": "a2c", "value_network": "shared"},
        {"estimator": "ppo", "num_steps": 16, "num_iterations": 2, "num_minibatches": 2},
        {"estimator": "optimal_per_timestep"},
        {"estimator": "ppo_clip", "num_iterations": 2, "learning_rate_schedule": "linear"},
        {"env": "Pendulum-v1", "max_episode_steps": 20, "normalize_observations": True, "reward_scale": 0.1},
        {"env": "Acrobot-v1", "max_episode_steps": 20, "hidden": (16,), "activation": "relu"},
        {"env": "gridworld", "hidden": ()},
        {"env": "FrozenLake-v1", "estimator": Estimator(baseline="rloo", entropy_coef=0.1)},
        {"env": "walk"},
        {"env": "bandit", "hidden": (), "num_envs": 8},
    ],
    ids=lambda options: " ".join(str(v) for v in options.values())[:40],
)
def test_everything_runs_together(tmp_path, options):
    lines = metrics_of(short(tmp_path, **options))
    assert all(math.isfinite(lines[-1][key]) for key in ("reward", "entropy", "grad_norm", "eval_reward"))


def test_pieces_learn_from_as_many_steps_as_asked_for_but_the_resets(tmp_path):
    lines = metrics_of(short(tmp_path, estimator="ppo", num_steps=32))
    resets = lines[1]["episodes"]
    assert 4 * 32 - resets <= lines[1]["num_env_steps"] <= 4 * 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": "Nope-v3"}, "no environment"),
        ({"head": "gaussian"}, "gaussian"),
        ({"env": "Pendulum-v1", "head": "softmax"}, "softmax"),
        ({"estimator": "reinforce", "max_episode_steps": 501}, "500"),
        ({"estimator": "rloo", "num_envs": 1}, "baseline 'rloo' compares the episodes.*num_envs is 1"),
        ({"estimator": "reinforce_timestep_mean", "num_envs": 1}, "num_envs is 1"),
        ({"estimator": "reinforce_baseline", "num_envs": 1}, "num_envs is 1"),
        ({"estimator": "rloo", "num_steps": 8}, "num_steps 8"),
        ({"estimator": "nope"}, "preset was given as 'nope'"),
        ({"num_envs": 0}, "num_envs was given as 0"),
        ({"max_steps": 1.5}, "max_steps was given as 1.5"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"reward_scale": 0.0}, "reward_scale"),
        ({"hidden": (0,)}, "hidden"),
        ({"learn_rate": 1}, "setting 'learn_rate'.*learning_rate"),
        ({"load": "nowhere"}, "No policy could be read from nowhere"),
        ({"output_dir": "a/../b"}, "'..'"),
        ({"activation": "gelu"}, "activation was given as 'gelu'"),
        ({"value_network": "other"}, "value_network was given as 'other'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_before_anything_is_written(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=message):
        train(**({"output_dir": "run"} | SHORT | options))
    assert not Path("run/config.json").exists()
    assert not Path("run/metrics.jsonl").exists()


def test_a_second_run_needs_overwrite(tmp_path):
    short(tmp_path)
    with pytest.raises(Refused, match="already holds a run"):
        short(tmp_path)
    assert short(tmp_path, overwrite=True, max_steps=1).steps == 1


def test_every_update_starts_from_states_of_its_own(tmp_path, monkeypatch):
    from tokenrl.control import training

    starts, learn = [], training.learn

    def seen(agent, rollout, step):
        starts.append(rollout.observations[:, 0].clone())
        return learn(agent, rollout, step)

    monkeypatch.setattr(training, "learn", seen)
    short(tmp_path, max_steps=3)
    assert len(torch.cat(starts).unique(dim=0)) == 3 * 4


def test_rates_fall_to_zero_and_a_small_network_uses_one_thread(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    options = {"max_steps": 4, "learning_rate": 0.4, "learning_rate_schedule": "linear", "quiet": False}
    with using_threads(2):
        result = short(tmp_path, **options)
        assert torch.get_num_threads() == 2
    assert [line["learning_rate"] for line in metrics_of(result)[1:]] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert json.loads((result.output_dir / "config.json").read_text())["threads"] == 1
    assert "threads 1 (fewer than 2 M parameters)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("file", ["policy.safetensors", "policy.json"])
def test_a_damaged_policy_is_refused(tmp_path, file):
    model = short(tmp_path).output_dir / "model"
    for damaged in (b"", b'{"shape": [1]}', None):
        (model / file).unlink() if damaged is None else (model / file).write_bytes(damaged)
        with pytest.raises(Refused, match=f"The folder {model} cannot be used: it.* {file}"):
            read_policy(model.parent)


def test_a_saved_policy_acts_as_it_did(tmp_path):
    result = short(tmp_path, estimator="a2c", normalize_observations=True)
    again = short(tmp_path, "again", estimator="a2c", normalize_observations=True,
                  load=str(result.output_dir), max_steps=0)  # fmt: skip
    assert again.steps == 0
    assert again.eval_before == again.eval_after
    assert again.eval_after["reward_greedy"] == result.eval_after["reward_greedy"]
    loaded = read_policy(result.output_dir)
    for name, value in result.policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(Refused, match="hidden"):
        short(tmp_path, "other", estimator="a2c", normalize_observations=True, load=str(result.output_dir),
              hidden=(8,))  # fmt: skip
    fresh = short(tmp_path, "uniform", estimator="a2c", normalize_observations=True, max_steps=0,
                  load=str(result.output_dir), initial_weights="uniform")  # fmt: skip
    assert fresh.eval_before["reward_greedy"] == result.eval_after["reward_greedy"]


def test_an_evaluation_in_between_does_not_change_the_run(tmp_path):
    often, never = (short(tmp_path, str(e), eval_every=e, max_steps=3) for e in (1, 0))
    drop = {"eval_reward", "eval_reward_greedy"}
    for one, two in zip(metrics_of(often), metrics_of(never), strict=True):
        assert one["step"] == 0 or one["entropy"] == two["entropy"]
        assert drop <= set(one)
    assert often.eval_after == never.eval_after


def test_a_signal_finishes_the_update_and_saves(tmp_path, monkeypatch):
    from tokenrl.control import training

    learn = training.learn

    def signalled(agent, rollout, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(agent, rollout, step)

    monkeypatch.setattr(training, "learn", signalled)
    result = short(tmp_path, max_steps=50)
    assert (result.exit_reason, result.exit_code, result.steps) == ("SIGTERM", 143, 2)
    assert read_policy(result.output_dir).shape == result.policy.shape
    assert json.loads((result.output_dir / "summary.json").read_text())["exit_reason"] == "SIGTERM"


def test_a_run_that_cannot_go_on_names_its_checkpoint(tmp_path, monkeypatch):
    from tokenrl.control import training

    learn = training.learn

    def breaks(agent, rollout, step):
        if step == 3:
            rollout.rewards.fill_(math.nan)
        return learn(agent, rollout, step)

    monkeypatch.setattr(training, "learn", breaks)
    with pytest.raises(Stopped, match=r"At step 3: .*not finite.*last complete checkpoint is .*step_000002"):
        short(tmp_path, max_steps=5, save_every=1, stop_after_nonfinite=1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "failed"
    assert not (tmp_path / "run" / "model").exists()


def test_solved_ends_the_run_when_asked(tmp_path, monkeypatch):
    from tokenrl.control import training

    monkeypatch.setattr(training, "describe", lambda env, limit: replace(describe(env), solved=1.0))
    result = short(tmp_path, max_steps=9, eval_every=2, stop_when_solved=True)
    assert (result.exit_reason, result.steps, result.solved) == ("solved", 0, True)


def test_entropy_that_has_collapsed_is_flagged(tmp_path):
    """A bandit that has found the better arm no longer explores."""
    options = {"env": "bandit", "hidden": (), "num_envs": 32, "max_steps": 40, "learning_rate": 0.3}
    result = short(tmp_path, **options)
    assert result.flags == ["entropy-collapsed"]
    assert json.loads((result.output_dir / "summary.json").read_text())["flags"] == ["entropy-collapsed"]
    bonus = Estimator.preset("reinforce_timestep_mean", entropy_coef=0.01)
    assert short(tmp_path, "bonus", estimator=bonus, **options).flags == []


def test_video_of_what_cannot_be_drawn(tmp_path):
    pytest.importorskip("moviepy")
    with pytest.raises(Refused, match="cannot be filmed"):
        short(tmp_path, env="bandit", video=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_cartpole_is_solved_on_every_seed(tmp_path, seed):
    result = train(
        env="CartPole-v1", seed=seed, output_dir=str(tmp_path), max_steps=60, eval_every=0, quiet=True
    )
    assert result.eval_after["reward"] >= 475
    assert result.eval_after["reward_greedy"] >= 475


@pytest.mark.parametrize("given", [None, "offscreen"])
def test_no_window_is_opened_and_later_ones_still_may_be(tmp_path, monkeypatch, given):
    seen = []

    class Watched(CartPoleEnv):
        def render(self):
            seen.append(os.environ.get("SDL_VIDEODRIVER"))
            return super().render()

    gymnasium.registry.pop("tokenrl-tests/Watched-v0", None)
    gymnasium.register("tokenrl-tests/Watched-v0", entry_point=Watched, max_episode_steps=9)
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    if given:
        monkeypatch.setenv("SDL_VIDEODRIVER", given)
    run = train(env="tokenrl-tests/Watched-v0", output_dir=str(tmp_path / "run"), **FILMED)
    assert (run.output_dir / "videos" / "episode-episode-0.mp4").stat().st_size > 1000
    assert set(seen) == {given or "dummy"}
    assert os.environ.get("SDL_VIDEODRIVER") == given


def test_an_environment_that_fails_to_draw_does_not_cost_the_policy(tmp_path, capsys):
    class Blind(CartPoleEnv):
        def render(self):
            raise RuntimeError("no paint")

    gymnasium.registry.pop("tokenrl-tests/Blind-v0", None)
    gymnasium.register("tokenrl-tests/Blind-v0", entry_point=Blind, max_episode_steps=9)
    run = train(env="tokenrl-tests/Blind-v0", output_dir=str(tmp_path / "run"), **{**FILMED, "quiet": False})
    said = " ".join(capsys.readouterr().out.split())
    assert "No video could be made" in said and "it raised RuntimeError: no paint" in said
    assert run.exit_code == 0 and (run.output_dir / "model" / "policy.safetensors").is_file()


def test_the_rate_is_by_the_clock_as_in_the_progress(tmp_path):
    """Summary and last line used the processor's time, ten times less on a machine that others use."""
    result = short(tmp_path)
    last = json.loads((result.output_dir / "timings.jsonl").read_text().splitlines()[-1])
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert summary["env_steps_per_second"] == pytest.approx(last["env_steps_per_second"])
    assert summary["env_steps_per_second"] == pytest.approx(result.env_steps / result.train_seconds)


def test_a_solved_agent_says_how_to_stop_there(tmp_path, monkeypatch, capsys):
    """The bandit's rewards are 1 and 0; a mean of .8 is reached on the way, and said once."""
    from tokenrl.control import training

    monkeypatch.setattr(training, "describe", lambda env, limit: replace(describe(env), solved=0.8))
    options = {"env": "bandit", "hidden": (), "num_envs": 32, "max_steps": 30, "learning_rate": 0.3}
    full = short(tmp_path, quiet=False, eval_every=3, eval_episodes=40, **options)
    said = " ".join(capsys.readouterr().out.split())
    assert full.steps == 30 and said.count("Solved at step") == 1
    assert "Training goes on to step 30; with --stop-when-solved it ends here." in said
    stopped = short(tmp_path, "stopped", stop_when_solved=True, eval_every=3, eval_episodes=40, **options)
    assert stopped.exit_reason == "solved" and f"Solved at step {stopped.steps}," in said
