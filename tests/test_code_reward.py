"""The recipe of a reward that runs programs: each case is a program, and what it earns beside others."""

import importlib.util
import sys
import time

import pytest
from folders import RECIPES

RECIPE = RECIPES / "language" / "code_reward.py"
RIGHT = "def double(x): return 2 * x"
TESTS = "assert double(2) == 4\nassert double('a') == 'aa'"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("code_reward", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SECONDS = 1
    return module


SLEEPS = "import time\nwhile True:\n  try: time.sleep(9)\n  except BaseException: pass"
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.pause()"
REWARDS = {
    RIGHT: 1,
    f"So:\n```python\n{RIGHT}\n```\nThat is all.": 1,
    f"```\nwrong\n```\n```python\n{RIGHT}\n```": 1,
    "def double(x): return x": 0,
    "def double(x:": 0,
    "": 0,
    f"{RIGHT}\nraise SystemExit(0)": 0,
    f"{RIGHT}\nwhile True: pass": 0,
    f"{RIGHT}\n{SLEEPS}": 0,
    f"{RIGHT}\n{DEAF}": 0,
    f"{RIGHT}\nkept = bytearray(2**33)": 0,
    f"{RIGHT}\nopen('large', 'wb').write(bytes(2**21))": 0,
    f"{RIGHT}\nopen('small', 'wb').write(bytes(2**10))": 1,
    f"{RIGHT}\nimport os\nassert not os.environ.get('HOME')": 1,
    f"{RIGHT}\ninput()": 0,
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of processes")
def test_a_program_is_rewarded_by_its_tests_alone_and_in_time(recipe):
    """Also as a message, and at the end of all the others."""
    programs = [*REWARDS, [{"role": "assistant", "content": RIGHT}]]
    began = time.monotonic()
    rewards = recipe.passes(programs, [TESTS] * 16, answer=["x"] * 16)
    assert dict(zip(REWARDS, rewards, strict=False)) == REWARDS
    assert rewards[-1] == 1 and recipe.passes.binary and time.monotonic() - began < 30


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of processes")
def test_what_a_program_starts_ends_with_it(recipe, tmp_path):
    sleeper = (
        f"import pathlib, time; time.sleep(2); pathlib.Path({str(tmp_path)!r}, 'late').touch()"
    )
    starts = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper!r}])"
    assert recipe.passes([f"{RIGHT}\n{starts}"], [TESTS]) == [1]
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()
