"""A file of the user's is one module, however it is named, and is read anew once it changes."""

from __future__ import annotations

import os
import sys

import pytest
from refusals import refused

from tokenrl import names
from tokenrl.language.rewards.loading import load_reward
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import find_task
from tokenrl.names import NamedFunction, import_attribute

GAME = """
import os
open("log", "a").write(__name__ + " ")
PLAYED = []
class Game:
    def reset(self, seed=None):
        PLAYED.append(1)
        return "?", {}
    def step(self, text):
        return "", 1.0, True, False, {}
def score(completions, environments=None, **_):
    games = [isinstance(game, Game) for game in environments or []]
    return [float(len(PLAYED) + all(games))] * len(completions)
def half(totals, **_):
    return totals / 2
def process(completions, **_):
    PLAYED.append(os.getpid())
    return [float(len(PLAYED))] * len(completions)
def again(completions, **_):
    return process(completions)
"""
BESIDE = (
    "from {} import Game, PLAYED\ndef right(completions, **_): return [1.0] * len(completions)\n"
)


@pytest.fixture(autouse=True)
def _game(workplace, monkeypatch):
    """A folder with the file game.py, links to it and a file that imports it; nothing else was imported."""
    monkeypatch.setattr(names, "OWN_MODULES", {})
    (workplace / "game.py").write_text(GAME)
    (workplace / "beside.py").write_text(BESIDE.format("game"))
    (workplace / "inner").mkdir()
    (workplace / "link.py").symlink_to("game.py")
    (workplace / "inner" / "link.py").symlink_to(workplace / "game.py")


def executions():
    with open("log") as file:
        return len(file.read().split())


WAYS = [
    "game.py",
    "./game.py",
    "inner/../game.py",
    "{}/game.py",
    "link.py",
    "inner/link.py",
    "game",
]


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
def test_a_file_is_executed_once_however_it_is_named(first, second, tmp_path):
    game = import_attribute(f"{first.format(tmp_path)}:Game", "environment")
    reward = load_reward(f"{second.format(tmp_path)}:score")
    assert reward.__globals__["Game"] is game and executions() == 1


@pytest.mark.parametrize("order", [("beside", "game"), ("game", "beside")])
@pytest.mark.parametrize("form", ["{}.py", "{}"])
def test_what_a_file_imports_from_the_one_beside_it_is_the_same(order, form):
    for name in order:
        import_attribute(f"{form.format(name)}:Game", "environment")
    played = [import_attribute(f"{name}.py:PLAYED", "task") for name in order]
    assert played[0] is played[1] and executions() == 1


def test_a_file_with_the_name_of_an_installed_module_is_a_module_of_its_own(tmp_path):
    for name in ("this.py", "random.py", "inner/game.py", "yaml.py"):
        (tmp_path / name).write_text(GAME)
        game = import_attribute(f"{name}:Game", "environment")
        assert import_attribute(f"{tmp_path}/{name}:Game", "task") is game
        assert game.__module__.startswith("tokenrl_file_")
    assert import_attribute("game.py:Game", "task").__module__ == "game"
    assert executions() == 5
    assert hasattr(__import__("random"), "Random")


def test_all_that_a_run_names_of_a_file_shares_it():
    arguments = TaskArguments(environment="game.py:Game", reward=("link.py:score", "game:again"))
    task, rewards = find_task(arguments)
    assert NamedFunction("./game.py:half").load().__globals__ is task.environment.reset.__globals__
    game = task.environment()
    game.reset()
    assert rewards.functions[0](["a"], environments=[game]) == [2.0]
    assert executions() == 1


def test_a_changed_file_is_read_anew_with_all_that_hold_parts_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for text in ("1", "2", "2", "3"):
        before = executions() if os.path.exists("log") else 0
        changed = (tmp_path / "game.py").read_text() != (game_text := GAME + f"ROUND = {text}\n")
        (tmp_path / "game.py").write_text(game_text)
        os.utime("game.py", (0, 0))  # byte code is chosen by time and size
        for order in ("beside.py:Game", "game.py:Game"), ("game:Game", "beside:Game"):
            games = {import_attribute(name, "environment") for name in order}
            assert len(games) == 1
            assert import_attribute("game:ROUND", "task") == int(text)
        assert executions() - before == changed


def test_a_file_that_failed_can_be_imported_once_it_is_mended(tmp_path):
    (tmp_path / "game.py").write_text(GAME + "broken")
    for name in ("beside.py:right", "game.py:score"):
        with refused("NameError"):
            load_reward(name)
    (tmp_path / "game.py").write_text(GAME)
    assert load_reward("beside.py:right")(["a"]) == [1.0]
