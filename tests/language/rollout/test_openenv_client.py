"""The recipe that plays on a server of OpenEnv's protocol, against a tiny server of our own."""

from __future__ import annotations

import json
import threading

import pyarrow.parquet as parquet
import pytest
from folders import RECIPES
from tiny_models import letters

import tokenrl
from tokenrl.language.rollout.episodes import ENDINGS

RECIPE = RECIPES / "language" / "openenv_client.py"
pytest.importorskip("websockets", reason="the extra openenv has websockets")
SECRETS = "abcd"


class Session:
    """The environment of one connection: which letter is it? Three guesses."""

    def answer(self, message: dict) -> dict:
        if message["type"] == "reset":
            self.secret, self.guesses = SECRETS[message["data"]["seed"] % 4], 0
            return self.observation(f"{self.secret}?>", None, False)
        guess = message["data"]["message"]
        if guess == "crash":
            return {
                "type": "error",
                "data": {"message": "no such letter", "code": "EXECUTION_ERROR"},
            }
        self.guesses += 1
        right = guess.startswith(self.secret)
        return self.observation("no>", float(right), right or self.guesses == 3)

    def observation(self, text: str, reward: float | None, done: bool) -> dict:
        """An observation as TextArena's servers send them."""
        messages = [{"sender_id": -1, "content": "old", "category": "PROMPT"}, {"content": text}]
        observation = {"prompt": "What is the letter?", "messages": messages}
        return {
            "type": "observation",
            "data": {"observation": observation, "reward": reward, "done": done},
        }


@pytest.fixture
def sessions(monkeypatch):
    """The paths of the connections to a server that runs meanwhile; None stands for each that was closed."""
    from websockets.sync.server import serve

    seen: list[str | None] = []

    def play(connection):
        seen.append(connection.request.path)
        session = Session()
        for raw in connection:
            connection.send(json.dumps(session.answer(json.loads(raw))))
        seen.append(None)

    with serve(play, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # on machines that have a proxy
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("OPENENV_URL", f"ws://127.0.0.1:{server.socket.getsockname()[1]}/")
        yield seen
        server.shutdown()
        thread.join()


def test_a_policy_trains_on_it(sessions, tmp_path):
    shape = {
        "max_steps": 2,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 6,
    }
    run = tokenrl.train(
        task=f"{RECIPE}:Env", model=letters(64), output_dir=tmp_path / "run", eval_size=2, max_turns=2,
        stop=[">"], cpu=True, quiet=True, **shape,
    )  # fmt: skip
    assert run.exit_reason == "finished" and sessions.count("/ws") <= 8  # 2 prompts, 4 generations
    (rows,) = [
        parquet.read_table(path).to_pylist() for path in (tmp_path / "run").rglob("*1.parquet")
    ]
    assert all(not row["failure"] and row["ending"] in ENDINGS[:4] for row in rows)
    assert {"role": "user", "content": "no>"} in [
        m for row in rows for m in json.loads(row["messages"])
    ]
