"""Train on a server of OpenEnv: an environment with gymnasium's interface on text, over websockets.

    export OPENENV_URL=ws://localhost:8000
    tokenrl train --task recipes/language/openenv_client.py:Env --model MODEL --chat --max-turns 6
    python recipes/language/openenv_client.py                               play an episode by hand

It needs websockets: `pip install -c constraints.txt -e '.[openenv]'`. The class can be copied alone. It is
written for TextArena's servers, such as the one of Wordle; for another server change `action` and `observed`.
Each episode of a step has a connection of its own, so the server must allow as many sessions as a step has
completions (`MAX_CONCURRENT_ENVS`). `--reward-timeout 60` ends an episode whose server does not answer. Seeds
are sent with reset; only a server that uses them gives the completions of a prompt the same episode.
Where the machine has a proxy (`HTTP_PROXY`), name a server that it cannot reach in `NO_PROXY`.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[openenv]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
import os
import weakref
from contextlib import ExitStack
from typing import Any

import tyro
from websockets.sync.client import connect


class Env:
    """An episode on a server, which has one environment for each connection."""

    action = "message"  # the field of the server's action that takes the policy's text

    def __init__(self) -> None:
        url = os.environ.get("OPENENV_URL", "ws://localhost:8000")
        opened = ExitStack()
        self.connection = opened.enter_context(
            connect(f"{url.rstrip('/')}/ws", max_size=None, close_timeout=1)
        )
        # called when nothing refers to this any more
        self.close = weakref.finalize(self, opened.close)

    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        return self.observed(self.answer("reset", {"seed": seed})["observation"]), {}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        data = self.answer("step", {self.action: text})
        return (
            self.observed(data["observation"]),
            float(data["reward"] or 0.0),
            data["done"],
            False,
            {},
        )

    def answer(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """Send a message, and return the data of the server's answer."""
        self.connection.send(json.dumps({"type": kind, "data": data}))
        answer = json.loads(self.connection.recv())
        if answer["type"] == "error":
            raise RuntimeError(answer["data"]["message"])
        return answer["data"]

    def observed(self, observation: dict[str, Any]) -> str:
        """Return the text of an observation: TextArena's newest message."""
        messages = observation.get("messages")
        return messages[-1]["content"] if messages else observation["prompt"]


def main(seed: int = 0) -> None:
    """Play an episode by hand, line by line.

    Args:
        seed: The seed that the server is sent.
    """
    env, done, total = Env(), False, 0.0
    text, _ = env.reset(seed=seed)
    while not done:
        text, reward, done, _, _ = env.step(input(f"{text}\n> "))
        total += reward
    print(f"{text}\nThe rewards of the episode sum to {total:g}.")
    env.close()


if __name__ == "__main__":
    tyro.cli(main)
