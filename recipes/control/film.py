"""Films one episode of a trained agent, with its most probable actions, by gymnasium's RecordVideo.

    tokenrl control --env CartPole-v1 --output-dir runs/cartpole
    python recipes/control/film.py runs/cartpole

Look for: the file videos/episode-episode-0.mp4 in the directory of the run. An environment must be able to draw
itself (`render_mode="rgb_array"`).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[control]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
import os
from pathlib import Path

import gymnasium
import tyro
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import RecordVideo

from tokenrl.control import Environments, collect_episodes, read_policy, seed_of


def main(run: tyro.conf.Positional[Path]) -> None:
    """Film one episode that starts as none of the training did.

    Args:
        run: Directory of a run of `tokenrl control`.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # many environments draw with SDL: no window
    settings = json.loads((run / "config.json").read_text())
    envs = Environments(settings["env"], 1, settings["max_episode_steps"])
    folder = str(run / "videos")

    def camera() -> gymnasium.Env:
        drawn = gymnasium.make(envs.env, render_mode="rgb_array", max_episode_steps=envs.horizon)
        return RecordVideo(drawn, folder, name_prefix="episode", disable_logger=True)

    envs.vector = SyncVectorEnv([camera])
    seed = seed_of(settings["seed"], 2, evaluation=True)
    episode = collect_episodes(envs, read_policy(run), None, seed=seed)
    envs.close()
    print(f"return {float(episode.returns):g}, video: {folder}/episode-episode-0.mp4")


if __name__ == "__main__":
    tyro.cli(main)
