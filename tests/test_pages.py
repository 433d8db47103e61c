"""What README, the pages and the notebooks show: commands exist and run, code runs and prints what stands there."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from command_line import completes
from folders import RECIPES, ROOT, read_json
from pages import blocks, commands, give_tools, make_chat_model_and_data, write_files

import tokenrl
from tokenrl.cli import COMMANDS, main
from tokenrl.flags import parse
from toy_tasks.models import TinyModel

TUTORIALS = RECIPES / "pages" / "tutorials"
PAGES = [ROOT / "README.md", *sorted(RECIPES.rglob("*.md"))]
NOTEBOOKS = sorted(RECIPES.glob("*.ipynb"))
LEARNING = TUTORIALS / "own_task.md"  # trains for a hundred steps
BRIEF = {  # what shortens a command of a page
    "train": "--max-steps 1 --eval-generations 0",
    "compare": "--dry-run",
    "control": "--max-steps 1 --eval-episodes 2",
    "reward-model": "--max-steps 1",
    "sft": "--max-steps 1",
}
WORDS = "reasoning_gym:spell_backward(min_word_len=3, max_word_len=4, size=2000)"
PACKAGES = {"LunarLander-v3": "Box2D", WORDS: "reasoning_gym"}
"""What a command needs that may not be installed; without it the command is refused."""
TINY = {"max_steps": 1, "max_completion_length": 2, "eval_generations": 0, "quiet": True}
SHORTENED = ("README", "resume", "estimators", "own_task")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def programs(page):
    """The programs of a page, and what it says that each prints: below it, or in comments."""
    for kind, text, output in blocks(page):
        if kind == "python" and not text.startswith("# "):  # a file, which a command names
            comments = re.findall(r"^print\(.*\)(?:  # (.+)$|\n((?:# .+\n)+))", text, re.MULTILINE)
            lines = [same or below.replace("# ", "").replace("\n", " ") for same, below in comments]
            yield text, output or "".join(f"{line.strip()}\n" for line in lines)


def shown_and_printed(page, capsys):
    """What the page says that its programs print, and what they print."""
    Path("data.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{n}>", "answer": str(n)}) for n in range(20))
    )
    write_files(page)
    for text, output in programs(page):
        Path("block.py").write_text(text)
        runpy.run_path("block.py")
        yield output, capsys.readouterr().out


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_the_commands_of_a_page_exist(page):
    for name, *words in commands(page):
        if name == "lab":
            name, *words = f"lab {words[0]}", *words[1:]
        assert parse(name, COMMANDS[name], words)


def own_programs(page):
    """The files of a page that it runs."""
    return re.findall(r"^python (\w+\.py)$", page.read_text(), re.MULTILINE)


def with_programs():
    """The pages that have programs; those that train are slow."""
    for page in PAGES:
        texts = [text for text, _ in programs(page)]
        trains = any(re.search(r"train\w*\(", text) for text in texts)
        marks = [pytest.mark.slow] if trains else []
        yield from [pytest.param(page, marks=marks)] if texts else []


@pytest.mark.parametrize("page", [*with_programs()], ids=name_of)
def test_the_python_of_a_page_prints_what_the_page_says(page, workplace, monkeypatch, capsys):
    train = tokenrl.train
    if page == LEARNING:
        monkeypatch.setattr(tokenrl, "train", lambda **options: train(**options | {"max_steps": 1}))
    elif page.stem in SHORTENED:
        tiny = TINY | {"model": TinyModel(tokens=tuple("0123456789>"))(seed=0)}
        monkeypatch.setattr(tokenrl, "train", lambda **options: train(**options | tiny))
    for shown, printed in shown_and_printed(page, capsys):
        if page == LEARNING:  # the reward after the training differs
            shown, printed = (re.sub("-> .*", "", text) for text in (shown, printed))
        assert shown == printed or (not shown and page.stem in SHORTENED)


@pytest.mark.slow
def test_the_python_of_a_page_that_learns_prints_what_the_page_says(workplace, capsys):
    assert all(shown == printed for shown, printed in shown_and_printed(LEARNING, capsys))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page) or own_programs(page)], ids=name_of
)
def test_the_commands_of_a_page_run(page, workplace, monkeypatch, handlers, short_warm_start):
    """All but those that need a download or vLLM, shortened."""
    write_files(page)
    train = tokenrl.train
    monkeypatch.setattr(tokenrl, "train", lambda **options: train(**options | {"max_steps": 1}))
    for name in own_programs(page):
        runpy.run_path(name)
    if page.stem == "pretrained":
        make_chat_model_and_data(workplace)
    if page.stem == "pretrained_tools":
        give_tools(workplace, monkeypatch)
    Path("recipes").symlink_to(RECIPES)
    if page == PAGES[0]:  # as `make train` does
        first = ["train", "--output-dir", "runs/sort_digits-rloo-seed0"]
        completes(*first, *BRIEF["train"].split())
    for name, *words in commands(page):
        if "downloads/run" in words:  # the page says where it comes from
            shutil.copytree("runs/vowels", "downloads/run", dirs_exist_ok=True)
        if page.stem == "pretrained":
            words = ["model" if "HuggingFaceTB" in word else word for word in words]
        if "HuggingFaceTB" not in " ".join(words) and "vllm" not in words:
            lacks = any(word in words and not find_spec(PACKAGES[word]) for word in PACKAGES)
            passed = (0, 2) if "--check" in words or lacks else (0,)
            brief = [] if "--run" in words else BRIEF.get(name, "").split()
            assert main([name, *words, *brief]) in passed, words


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_seeds_of_several_machines_are_gathered_as_the_page_says(workplace, refusal):
    page = RECIPES / "pages" / "guides" / "scaling.md"
    write_files(page)
    task = yaml.safe_load(Path("seeds.yaml").read_text())
    assert {*task} == {"workdir", "resources", "envs", "setup", "run"}
    (slurm,) = (text for _, text, _ in blocks(page) if "#SBATCH" in text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for script, name, first in (
        (slurm, "SLURM_ARRAY_TASK_ID", 0),
        (slurm, "SLURM_ARRAY_TASK_ID", 2),
        (task["run"], "FIRST", 4),
    ):
        words = ["bash", "-ec", 'srun() { "$@"; }\n' + script]
        environment = {**os.environ, "PATH": path, name: str(first)}
        subprocess.run(words, check=True, env=environment, capture_output=True)
        plan = read_json(f"runs/seeds_{first}/plan.json")["plan"]
        assert plan["seeds"] == [first, first + 1]
    (words,) = (words for words in commands(page) if "--collect" in words)
    completes(*words, "--quiet")
    changed = "--num-envs", "16", "--output-dir", "runs/changed"
    reason = "made with other settings than this comparison has: num_envs"
    assert reason in refusal(*words, *changed)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_runs_and_its_assertions_hold(path, tmp_path, cache, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    # Plain lines: rich would make a display of each, or move the cursor of a terminal.
    text = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    assert "tokenrl train: " in text and "step 40/40  training reward" in text
    assert "\x1b" not in text and "\r" not in text


@pytest.mark.slow
def test_an_interruption_ends_the_run_but_not_the_notebook(tmp_path, cache, monkeypatch):
    manager = pytest.importorskip("jupyter_client").manager
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    kernels, kernel = manager.start_new_kernel(cwd=str(tmp_path))
    try:
        train = 'r = tokenrl.train(task="vowels", max_steps=10_000, output_dir="run")\nprint(r.exit_reason)'
        kernel.execute(f"import tokenrl\n{train}")
        deadline, printed = time.monotonic() + 120, ""
        while "SIGINT\n" not in printed:
            assert time.monotonic() < deadline, printed
            text = kernel.get_iopub_msg(timeout=120)["content"].get("text", "")
            printed += text
            if "step     1/10000" in text:
                kernels.interrupt_kernel()
        answer = kernel.execute_interactive("assert (r.output_dir / 'model').is_dir()")
        assert answer["content"]["status"] == "ok"
    finally:
        kernels.shutdown_kernel(now=True)
