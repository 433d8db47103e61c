"""What a user who installs the wheel gets: every module of tokenrl and toy_tasks, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile

from folders import ROOT

import tokenrl

SOURCE = (".py", ".pyi")  # a stub holds the public names of its package
DATA = {
    "tokenrl/py.typed",
    "tokenrl/control/agents.yaml",
    "tokenrl/core/presets.txt",
    "tokenrl/foreign.txt",
    "tokenrl/lab/exact/trl_config.yaml",
    "tokenrl/runs/metric_table.txt",
    *(f"tokenrl/runs/{page}.html" for page in ("page", "run", "comparison")),
    *(f"tokenrl/runs/page.{kind}" for kind in ("css", "js", "mplstyle")),
}


def modules(package: str) -> set[str]:
    files = (ROOT / package).rglob("*.py*")
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix in SOURCE}


def test_the_wheel_holds_the_modules_their_types_the_licence_and_the_command(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    about = f"tokenrl_lm-{tokenrl.__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        texts = {
            name: archive.read(about + name).decode() for name in ("METADATA", "entry_points.txt")
        }
    code = {name for name in names if not name.startswith(about)}
    assert code == modules("tokenrl") | modules("toy_tasks") | DATA
    records = {"METADATA", "WHEEL", "entry_points.txt", "RECORD", "licenses/LICENSE"}
    assert {name.removeprefix(about) for name in names - code} == records
    assert "Name: tokenrl-lm\n" in texts["METADATA"]
    assert texts["entry_points.txt"].splitlines()[1:] == ["tokenrl = tokenrl.__main__:main"]
