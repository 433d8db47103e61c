"""The notebook under recipes/: it runs from top to bottom, and a run in a notebook can be interrupted."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "recipes").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """What the kernel inherits: its folder and its cache are the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def outputs(cell, kind: str) -> str:
    return "".join(
        output.get("text", "") for output in cell["outputs"] if output.get("name") == kind
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_are_those_of_one_whole_run(path):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 300_000 and not re.search(
        r"/(tmp|home|root|work)/", path.read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_assertions_hold(path, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell["outputs"] = []
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": tmp_path}}
    ).execute()
    code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    assert (
        sum("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
        == 3
    )
    header = next(
        outputs(cell, "stdout") for cell in code if "tokenrl train: " in outputs(cell, "stdout")
    )
    # One stream of plain lines: rich would make an output of each, or move the cursor of a terminal.
    assert "step 40/40  reward" in header and "\x1b" not in header and "\r" not in header


@pytest.mark.slow
def test_an_interruption_ends_the_run_but_not_the_notebook(tmp_path):
    manager = pytest.importorskip("jupyter_client").manager
    kernels, kernel = manager.start_new_kernel(cwd=str(tmp_path))
    try:
        train = 'r = tokenrl.train(task="vowels", max_steps=10_000, output_dir="run")\nprint(r.exit_reason)'
        kernel.execute(f"import tokenrl\n{train}")
        deadline, printed = time.monotonic() + 120, ""
        while "SIGINT\n" not in printed:
            assert time.monotonic() < deadline, printed
            message = kernel.get_iopub_msg(timeout=120)
            printed += message["content"].get("text", "")
            if "step     1/10000" in message["content"].get("text", ""):
                kernels.interrupt_kernel()
        answer = kernel.execute_interactive(
            "assert r.steps < 10_000 and (r.output_dir / 'model').is_dir()"
        )
        assert answer["content"]["status"] == "ok"
        assert (
            json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "SIGINT"
        )
    finally:
        kernels.shutdown_kernel(now=True)
