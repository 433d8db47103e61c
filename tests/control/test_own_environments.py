"""Environments that a user's file or module registers: found, saved with the run, and explained if not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import gymnasium
import pytest

from tokenrl.control.environments import describe
from tokenrl.control.numpy_agent import NumpySettings, train_numpy
from tokenrl.control.registered import find
from tokenrl.errors import Refused

FILE = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv


class Mine(CartPoleEnv):
    pass


gymnasium.register("{name}-v0", entry_point={entry}, max_episode_steps=7)
gymnasium.register("{name}Other-v1", entry_point=Mine, max_episode_steps=8)
"""
SMALL = ["--num-envs", "2", "--max-steps", "1", "--eval-episodes", "2", "--quiet"]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file in an empty current directory; afterwards, import paths are as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name, text=FILE, entry="Mine"):
        (tmp_path / f"{name}.py").write_text(text.format(name=name, entry=entry))
        return name

    return write


def tokenrl(*argv):
    """Run a command as the console script does, which does not have the current directory in sys.path."""
    root = os.path.dirname(os.path.dirname(find.__code__.co_filename))
    env = {**os.environ, "PYTHONPATH": os.path.dirname(root), "PYTHONSAFEPATH": "1"}
    code = "import sys; from tokenrl.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=env, timeout=120
    )


@pytest.mark.parametrize(
    ("source", "entry"),
    [
        pytest.param("a_file.py", "Mine", marks=pytest.mark.slow),
        pytest.param("a_file.py", "'a_file:Mine'", marks=pytest.mark.slow),
        *(pytest.param("a_file", entry, marks=pytest.mark.slow) for entry in ("Mine", "'a_file:Mine'")),
    ],
)
def test_a_run_in_an_environment_of_ones_own_can_be_repeated(write, source, entry):
    """A file, or a module in the current directory; its class may be given by its name, too."""
    write("a_file", entry=entry)
    done = tokenrl("control", "--env", f"{source}:a_file-v0", "--output-dir", "one", *SMALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with open("one/config.json") as file:
        assert json.load(file)["env"] == f"{source}:a_file-v0"
    again = tokenrl("control", "--config", "one/config.json", "--output-dir", "two", "--quiet")
    assert (again.returncode, again.stderr) == (0, "")
    with open("one/metrics.jsonl") as one, open("two/metrics.jsonl") as two:
        assert one.read() == two.read()


def test_advice_for_it_names_it_as_it_was_given(write):
    write("advised")
    done = tokenrl("advise", "--env", "advised.py:advised-v0", "--episodes", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--env advised.py:advised-v0" in done.stdout


def test_it_is_imported_once_and_without_warnings(write, recwarn):
    name = write("once")
    specs = [find(f"{name}.py:{name}-v0") for _ in range(2)]
    assert specs[0].entry_point is specs[1].entry_point is find(f"./once.py:{name}-v0").entry_point
    assert find(f"{name}:{name}-v0").entry_point is not specs[0].entry_point  # the module registers anew
    assert [str(one.message) for one in recwarn] == []
    assert describe(f"{name}:{name}-v0").horizon == 7
    assert describe(f"{name}.py:CartPole-v1").horizon == 500


def test_the_agent_without_autodiff_takes_it_too(write):
    name = write("plain")
    _, episodes = next(train_numpy(NumpySettings(env=f"{name}.py:{name}-v0")))
    assert max(len(episode.rewards) for episode in episodes) == 7


@pytest.mark.parametrize(
    ("text", "env", "message"),
    [
        (FILE, "nofile.py:X-v0", "there is no file nofile.py; give its path from"),
        (FILE, "nomodule:X-v0", "there is no module nomodule. The module has to be installed or lie in"),
        ("raise RuntimeError('no licence')", "wrong.py:X-v0", r"raised RuntimeError: no licence\.$"),
        ("import nopackage", "wrong.py:X-v0", "ModuleNotFoundError: No module named 'nopackage'"),
        ("x = (", "wrong.py:X-v0", "SyntaxError.*never closed"),
        ("", "wrong.py:X-v0", r"registers no environment 'X-v0'. Call gymnasium.register\('X-v0', ...\)"),
        (FILE, "wrong.py:wrnog-v0", "Did you mean 'wrong-v0'.*Available: wrong-v0, wrongOther-v1"),
        (FILE, "wrong.py:wrong", "Did you mean 'wrong-v0'"),
        (FILE, "wrong.py:", "registers no environment ''. Available: wrong-v0, wrongOther-v1"),
    ],
)
def test_files_that_lead_nowhere(write, text, env, message):
    for name in ("wrong-v0", "wrongOther-v1"):
        gymnasium.registry.pop(name, None)
    write("wrong", text)
    for _ in range(2):  # also if it has been imported before
        with pytest.raises(Refused, match=message):
            find(env)
