"""What a user who installs the wheel gets: every module of tokenrl and toy_tasks, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tokenrl

ROOT = Path(__file__).parents[1]
SOURCE = (".py", ".pyi")  # a stub holds the public names of its package
DATA = {"tokenrl/py.typed", *(f"tokenrl/runs/page.{kind}" for kind in ("html", "css", "js"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        yield archive


@pytest.fixture
def names(wheel):
    return set(wheel.namelist())


def modules(package: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py*") if path.suffix in SOURCE
    }


def test_the_wheel_holds_the_modules_their_types_and_the_licence(names):
    about = {name.partition("/")[2] for name in names if ".dist-info/" in name}
    assert about == {"METADATA", "WHEEL", "entry_points.txt", "RECORD", "licenses/LICENSE"}
    code = {name for name in names if ".dist-info/" not in name}
    assert code == modules("tokenrl") | modules("toy_tasks") | DATA


def test_the_distribution_has_a_name_of_its_own_and_the_command_keeps_its_name(wheel, names):
    folder = f"tokenrl_lm-{tokenrl.__version__}.dist-info"
    assert f"{folder}/METADATA" in names
    assert "Name: tokenrl-lm\n" in wheel.read(f"{folder}/METADATA").decode()
    commands = wheel.read(f"{folder}/entry_points.txt").decode().splitlines()
    assert commands[1:] == ["tokenrl = tokenrl.__main__:main"]


def test_the_rooms_are_all_there(names):
    for room in ("core", "runs", "control", "language/training", "lab/exact", "advisor"):
        assert f"tokenrl/{room}/__init__.py" in names
