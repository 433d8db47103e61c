"""What `train_agent` refuses before it writes anything: a table of settings and the words of the message."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces
from odd_env import THREE, TWO, register_odd
from refusals import refused

from tokenrl import train_agent
from tokenrl.control import ControlArguments
from tokenrl.core import Estimator

PICTURE = spaces.Box(0, 255, (96, 96, 3), np.uint8)
WHOLE = Estimator(baseline="value", returns="episode_normalized")
DIVIDED = Estimator(baseline="value", returns="reward_to_go", scale="batch_std")
WRITTEN = {"broken.py": "raise RuntimeError('no licence')", "empty.py": ""}

REFUSED = [
    ({"agent": "clasic"}, "agent was given as 'clasic'. Did you mean 'classic'"),
    ({"agent": "tuned", "env": "walk"}, "no settings for 'walk'.*CartPole-v1, Acrobot-v1, Lunar"),
    ({"agent": "classic", "args": ControlArguments()}, "args holds all settings"),
    ({"env": "Nope-v1"}, "no environment 'Nope-v1'.*gridworld, trap, walk, costly_walk, bandit"),
    ({"env": "LunarLander-v2"}, "use `LunarLander-v3` instead"),
    ({"env": "CartPole"}, "no environment 'CartPole'.*with its version"),
    ({"env": ""}, "no environment ''"),
    ({"env": "Blackjack-v1"}, "no limit in length.*--max-episode-steps"),
    ({"env": "nofile.py:X-v0"}, "there is no file .*nofile.py; give its path from"),
    ({"env": "broken.py:X-v0"}, r"raised RuntimeError: no licence\.$"),
    ({"env": "empty.py:X-v0"}, r"Call gymnasium.register\('X-v0', ...\) in empty.py"),
    ({"head": "gaussian"}, "head 'gaussian' cannot give the actions of CartPole-v1; use 'softmax'"),
    ({"head": "softmax", "env": "Pendulum-v1"}, "cannot give the actions .*use 'gaussian'"),
    ({"load": "nowhere"}, "No policy could be read from nowhere"),
    ({"estimator": "reinforce", "max_episode_steps": 501}, "500"),
    ({"estimator": "rloo", "num_envs": 1}, "compares the rows of a .*(num_envs|step has 1)"),
    ({"estimator": Estimator(beta=0.1)}, "no reference policy"),
    ({"estimator": "remax"}, "starts in the same state"),
    ({"estimator": Estimator(zero_spread="drop")}, "no prompts"),
    ({"estimator": Estimator(truncations="mask")}, "time limit"),
    ({"estimator": Estimator(overlong_buffer=3)}, "environment itself rewards length"),
    ({"estimator": "rloo", "num_steps": 8}, "num_steps 8.*only a critic"),
    ({"estimator": WHOLE, "num_steps": 8}, "or normalised"),
    ({"estimator": DIVIDED, "num_steps": 8}, "cannot be compared"),
]
SPACES = [
    (spaces.Dict({"a": TWO}), TWO, "Observations of .* are Dict.*wrappers.FlattenObservation"),
    (PICTURE, TWO, r"are pictures \(Box\(0, 255, \(96, 96, 3\), uint8\)\)"),
    (THREE, spaces.MultiDiscrete([2, 3]), r"Actions of .* MultiDiscrete\(\[2 3\]\)"),
    (THREE, spaces.Box(-1, 1, (2, 2)), r"Box\(.*\(2, 2\).*with one axis"),
    (THREE, spaces.Box(0, 9, (2,), np.int64), "int64.*Box of real numbers"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused_before_anything_is_written(workplace, options, message):
    for name, text in WRITTEN.items():
        (workplace / name).write_text(text)
    with refused(message):
        train_agent(**options, **{} if "args" in options else {"output_dir": "run"})
    assert not list(workplace.rglob("*.json*"))


@pytest.mark.parametrize(("observations", "actions", "message"), SPACES, ids=str)
def test_spaces_that_are_not_supported(observations, actions, message):
    with refused(message):
        train_agent(env=register_odd(observations, actions))
