"""The recipe that plays on a server of OpenEnv's protocol, against a tiny server of our own."""

from __future__ import annotations

import json
import threading

import pyarrow.parquet as parquet
import pytest
from folders import RECIPES
from tiny_models import letters, letters_trained

from tokenrl.language.rollout.episodes import ENDINGS

RECIPE = RECIPES / "language" / "openenv_client.py"
pytest.importorskip("websockets", reason="the extra openenv has websockets")
SECRETS = "abcd"


class Session:
    """The environment of one connection: which letter is it? Three guesses."""

    def answer(self, message: dict) -> dict:
        """An observation as TextArena's servers send them."""
        data = message["data"]
        if message["type"] == "reset":
            self.secret, self.guesses = SECRETS[data["seed"] % 4], 0
            text, reward, done = f"{self.secret}?>", None, False
        else:
            self.guesses += 1
            is_right = data["message"].startswith(self.secret)
            text, reward, done = "no>", float(is_right), is_right or self.guesses == 3
        messages = [{"sender_id": -1, "content": "old", "category": "PROMPT"}, {"content": text}]
        observation = {"prompt": "What is the letter?", "messages": messages}
        data = {"observation": observation, "reward": reward, "done": done}
        return {"type": "observation", "data": data}


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
    task, model = f"{RECIPE}:Env", letters(64)
    sizes = {"prompts_per_step": 2, "num_generations": 2, "max_steps": 2, "eval_size": 2}
    sizes |= {"max_completion_length": 6, "max_turns": 2, "stop": [">"], "eval_every": 1}
    run = letters_trained(tmp_path / "run", task, model=model, **sizes)
    assert run.exit_reason == "finished" and sessions.count("/ws") <= 8  # 2 prompts, 4 generations
    (table,) = (tmp_path / "run").rglob("*1.parquet")
    rows = parquet.read_table(table).to_pylist()
    assert all(not row["failure"] and row["ending"] in ENDINGS[:4] for row in rows)
    messages = [message for row in rows for message in json.loads(row["messages"])]
    assert {"role": "user", "content": "no>"} in messages
