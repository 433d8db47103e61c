"""A film is made in silence and without a window, and a failure to draw does not cost the trained policy."""

from __future__ import annotations

import os
import subprocess
import sys

import gymnasium
import pytest
from gymnasium.envs.classic_control import CartPoleEnv

from tokenrl.control.training import train_agent as train

pytest.importorskip("moviepy")
SMALL = {"num_envs": 2, "max_steps": 1, "eval_episodes": 2, "quiet": True, "video": True}


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
    run = train(env="tokenrl-tests/Watched-v0", output_dir=str(tmp_path / "run"), **SMALL)
    assert (run.output_dir / "videos" / "episode-episode-0.mp4").stat().st_size > 1000
    assert set(seen) == {given or "dummy"}
    assert os.environ.get("SDL_VIDEODRIVER") == given


@pytest.mark.slow
@pytest.mark.parametrize("env", ["CartPole-v1", "LunarLander-v3"])
def test_nothing_is_said_where_there_is_no_display(tmp_path, env):
    if env == "LunarLander-v3":
        pytest.importorskip("Box2D")
    bare = {name: value for name, value in os.environ.items() if name not in ("XDG_RUNTIME_DIR", "DISPLAY")}
    code = f"from tokenrl import train_agent; train_agent(env={env!r}, output_dir='run', **{SMALL})"
    root = os.getcwd() + os.pathsep + os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env={**bare, "PYTHONPATH": root}, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "run" / "videos" / "episode-episode-0.mp4").is_file()


def test_an_environment_that_fails_to_draw_does_not_cost_the_policy(tmp_path, capsys):
    class Blind(CartPoleEnv):
        def render(self):
            raise RuntimeError("no paint")

    gymnasium.registry.pop("tokenrl-tests/Blind-v0", None)
    gymnasium.register("tokenrl-tests/Blind-v0", entry_point=Blind, max_episode_steps=9)
    run = train(env="tokenrl-tests/Blind-v0", output_dir=str(tmp_path / "run"), **{**SMALL, "quiet": False})
    said = " ".join(capsys.readouterr().out.split())
    assert "No video could be made: RuntimeError: no paint" in said
    assert run.exit_code == 0 and (run.output_dir / "model" / "policy.safetensors").is_file()
