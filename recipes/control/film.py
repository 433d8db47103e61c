"""Films one episode of a trained agent, with its most probable actions.

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
from imageio_ffmpeg import write_frames

from tokenrl.control import Environments, collect_episodes, read_policy, seed_of


def main(run: tyro.conf.Positional[Path]) -> None:
    """Film one episode that starts as none of the training did.

    Args:
        run: Directory of a run of `tokenrl control`.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # many environments draw with SDL: no window
    settings = json.loads((run / "config.json").read_text())
    envs = Environments(settings["env"], 1, settings["max_episode_steps"])
    film = run / "videos" / "episode-episode-0.mp4"
    film.parent.mkdir(exist_ok=True)

    def camera() -> gymnasium.Env:
        mode = "rgb_array_list"  # it keeps the frames of an episode
        return gymnasium.make(envs.env, render_mode=mode, max_episode_steps=envs.horizon)

    envs.vector = SyncVectorEnv([camera])
    seed = seed_of(settings["seed"], 2, evaluation=True)
    episode = collect_episodes(envs, read_policy(run), None, seed=seed)
    (drawn,) = envs.vector.envs
    frames = drawn.render()
    size = frames[0].shape[1::-1]
    video = write_frames(str(film), size, fps=drawn.metadata["render_fps"], macro_block_size=2)
    for frame in (None, *frames):  # the first opens the file
        video.send(frame)
    video.close()
    envs.close()
    print(f"return {float(episode.returns):g}, video: {film}")


if __name__ == "__main__":
    tyro.cli(main)
